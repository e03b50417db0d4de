# make install / make uninstall; the variables are explained in systemd/install.sh
PREFIX ?= /opt/gpuctl
BINDIR ?= /usr/local/bin

.PHONY: install uninstall
install uninstall:
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' BINDIR='$(BINDIR)' PYTHON='$(PYTHON)' \
	PURGE='$(PURGE)' systemd/install.sh $@
