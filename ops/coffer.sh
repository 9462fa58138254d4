#!/bin/sh
# `coffer` on an installed machine (/usr/local/bin/coffer): with the settings and secrets of /etc/coffer, which services have from systemd, and
# as Coffer's account, to which stored files belong. Who may not read those settings can still use what talks to a server: upload, ls, get, rm.
set -eu
program=/opt/coffer/current/.venv/bin/coffer

if [ -r /etc/coffer/coffer.env ]; then
    set -a
    . /etc/coffer/coffer.env
    set +a
    export CREDENTIALS_DIRECTORY="${CREDENTIALS_DIRECTORY:-/etc/coffer/credentials}"
fi
case "$(id -u):${1-}:${2-}" in
    0:edge:install | 0:edge:check)
        # Without options of its own, with those that `make install` was told: otherwise nginx would lose its names and certificate.
        case " $* " in
            " edge install " | " edge install --for-real " | " edge check ")
                [ ! -r /etc/coffer/edge.options ] || set -- "$@" $(cat /etc/coffer/edge.options) ;;
        esac ;;
    # These look after nginx and the machine, whose files are root's, or read and write files of whoever calls.
    0:edge:* | 0:doctor:* | 0:status:* | 0:hetzner:* | 0:upload:* | 0:ls:* | 0:get:* | 0:rm:* | 0:user:export) ;;
    0:*)
        umask 027
        HOME=/var/lib/coffer exec setpriv --reuid coffer --regid coffer --init-groups -- "$program" "$@" ;;
esac
exec "$program" "$@"
