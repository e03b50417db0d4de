#!/bin/sh
# Install or remove the service: install.sh install|uninstall
#   PREFIX   where gpuctl lives (/opt/gpuctl)
#   PYTHON   makes the virtual environment in PREFIX, from this checkout (python3)
#   SERVICE_PYTHON  a Python whose environment already has gpuctld: nothing is made then
#   BINDIR   where the two commands are linked (/usr/local/bin)
#   DESTDIR  stage everything below this folder and touch nothing that runs; needs SERVICE_PYTHON
#   PURGE=1  uninstall removes configuration, state and the account as well
set -eu

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/opt/gpuctl}
BINDIR=${BINDIR:-/usr/local/bin}
PYTHON=${PYTHON:-python3}
SERVICE_PYTHON=${SERVICE_PYTHON:-}
PURGE=${PURGE:-0}
LIBDIR=/usr/local/lib
HERE=$(cd "$(dirname "$0")" && pwd)
SYSTEM_UNITS="gpuctld.service gpuctld-workers.socket gpuctld-workers.service gpuctld-nvidia.service"

die() { echo "install: $*" >&2; exit 1; }

# True where a systemd runs that the staged files are meant for.
live() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

put() { # put MODE SOURCE TARGET: copy with the prefix filled in
    mkdir -p "$(dirname "$DESTDIR$3")"
    sed "s#/opt/gpuctl#$PREFIX#g" "$2" > "$DESTDIR$3.tmp"
    chmod "$1" "$DESTDIR$3.tmp"
    mv "$DESTDIR$3.tmp" "$DESTDIR$3"
}

command_for() { # command_for NAME MODULE: a command that runs in the given Python
    printf '#!/bin/sh\nexec "%s" -c "import sys; from %s import main; sys.exit(main())" "$@"\n' \
        "$SERVICE_PYTHON" "$2" > "$DESTDIR$PREFIX/bin/$1"
    chmod 755 "$DESTDIR$PREFIX/bin/$1"
}

install_program() {
    if [ -z "$SERVICE_PYTHON" ]; then
        [ -z "$DESTDIR" ] || die "DESTDIR needs SERVICE_PYTHON: an environment cannot be moved"
        "$PYTHON" -m venv "$PREFIX"
        "$PREFIX/bin/pip" install --quiet --upgrade "$HERE/..[daemon]"
    else
        mkdir -p "$DESTDIR$PREFIX/bin"
        command_for gpuctl gpuctl.cli
        command_for gpuctld gpuctld.__main__
        command_for gpuctld-workers gpuctld.worker.forkserver
    fi
    mkdir -p "$DESTDIR$BINDIR"
    ln -sfn "$PREFIX/bin/gpuctl" "$DESTDIR$BINDIR/gpuctl"
    ln -sfn "$PREFIX/bin/gpuctld" "$DESTDIR$BINDIR/gpuctld"
}

install_config() {
    target=/etc/gpuctl/config.toml
    if [ ! -e "$DESTDIR$target" ]; then
        put 644 "$HERE/config.toml" "$target"
    elif ! cmp -s "$HERE/config.toml" "$DESTDIR$target"; then
        put 644 "$HERE/config.toml" "$target.new"
        echo "kept $target; the new default is $target.new"
    fi
}

install_files() {
    for unit in $SYSTEM_UNITS; do
        put 644 "$HERE/$unit" "$LIBDIR/systemd/system/$unit"
    done
    put 644 "$HERE/user/gpuctld.service" "$LIBDIR/systemd/user/gpuctld.service"
    put 644 "$HERE/sysusers.d/gpuctl.conf" "$LIBDIR/sysusers.d/gpuctl.conf"
    put 644 "$HERE/tmpfiles.d/gpuctl.conf" "$LIBDIR/tmpfiles.d/gpuctl.conf"
    put 755 "$HERE/nvidia-nodes.sh" "$PREFIX/lib/gpuctl/nvidia-nodes"
    put 644 "$HERE/gpuctld.service.d/tcp.conf.example" "$PREFIX/share/doc/gpuctl/tcp.conf.example"
    put 644 "$HERE/../docs/operations.md" "$PREFIX/share/doc/gpuctl/operations.md"
}

install_all() {
    install_program
    install_files
    install_config
    if live; then
        systemd-sysusers gpuctl.conf
        systemctl daemon-reload
    fi
    cat <<NEXT
installed. Next:
  edit /etc/gpuctl/config.toml       # name your models
  systemctl enable --now gpuctld     # start it, now and at boot
  usermod -aG gpuctl NAME            # let NAME use it (takes effect at the next login)
NEXT
}

remove_program() {
    rm -f "$DESTDIR$BINDIR/gpuctl" "$DESTDIR$BINDIR/gpuctld"
    if [ -e "$DESTDIR$PREFIX/lib/gpuctl/nvidia-nodes" ] && [ -e "$DESTDIR$PREFIX/pyvenv.cfg" ]; then
        rm -rf "$DESTDIR$PREFIX"
        return
    fi
    rm -f "$DESTDIR$PREFIX/bin/gpuctl" "$DESTDIR$PREFIX/bin/gpuctld" \
        "$DESTDIR$PREFIX/bin/gpuctld-workers"
    rm -rf "$DESTDIR$PREFIX/lib/gpuctl" "$DESTDIR$PREFIX/share/doc/gpuctl"
    for empty in share/doc share lib bin .; do
        rmdir "$DESTDIR$PREFIX/$empty" 2>/dev/null || :
    done
    rmdir "$DESTDIR$PREFIX" 2>/dev/null || :
}

remove_files() {
    for unit in $SYSTEM_UNITS; do
        rm -f "$DESTDIR$LIBDIR/systemd/system/$unit"
    done
    rm -f "$DESTDIR$LIBDIR/systemd/user/gpuctld.service" \
        "$DESTDIR$LIBDIR/sysusers.d/gpuctl.conf" "$DESTDIR$LIBDIR/tmpfiles.d/gpuctl.conf"
    for empty in systemd/system systemd/user systemd sysusers.d tmpfiles.d; do
        rmdir "$DESTDIR$LIBDIR/$empty" 2>/dev/null || :
    done
}

purge() {
    rm -rf "$DESTDIR/etc/gpuctl" "$DESTDIR/var/lib/gpuctl" "$DESTDIR/var/cache/gpuctl" \
        "$DESTDIR/var/log/gpuctl"
    for changed in gpuctld.service gpuctld-workers.service system-gpuctl.slice; do
        for place in etc/systemd/system etc/systemd/system.control run/systemd/system.control; do
            rm -rf "$DESTDIR/$place/$changed.d"
        done
    done
    [ -z "$DESTDIR" ] || return 0
    if getent passwd gpuctl >/dev/null; then userdel gpuctl; fi
    if getent group gpuctl >/dev/null; then groupdel gpuctl; fi
}

uninstall_all() {
    if live; then
        systemctl disable --now $SYSTEM_UNITS 2>/dev/null || :
    fi
    remove_files
    remove_program
    if live; then
        systemctl daemon-reload
        systemctl reset-failed $SYSTEM_UNITS 2>/dev/null || :
    fi
    if [ "$PURGE" = 1 ]; then purge; fi
}

case ${1:-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) die "usage: install.sh install|uninstall" ;;
esac
