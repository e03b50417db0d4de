# make install / make uninstall; systemd/install.sh explains the variables
PREFIX ?= /opt/gpuctl
PYTHON ?= python3
BINDIR ?= /usr/local/bin

.PHONY: install uninstall
install uninstall:
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' BINDIR='$(BINDIR)' PYTHON='$(PYTHON)' \
	SERVICE_PYTHON='$(SERVICE_PYTHON)' PURGE='$(PURGE)' systemd/install.sh $@
