#!/bin/bash
# Installs Coffer on a Debian machine with systemd, upgrades it, and takes it away again: `make install`, `make upgrade`, `make uninstall`.
#
#     ops/install.sh [--rehearse] install | upgrade | uninstall
#
# --rehearse tells what would be done, and does nothing. Every step is safe to repeat: after an interruption, or after a change of the settings,
# run it again. It changes nothing where nothing is to be changed, and never a setting, a secret or a unit that somebody wrote.
#
#     /opt/coffer/releases/<id>   the code, each release with its own virtual environment; `current` points to the one in use
#     /etc/coffer/coffer.env      settings; credentials/ holds secrets, 0600; edge.options are those of `coffer edge install`
#     /var/lib/coffer             the first volume, and metrics
#     /usr/local/bin/coffer       the command, with those settings
#     /usr/local/lib/systemd/system    units, from systemd/; /etc/systemd/system is left to overrides and masks of yours
#
# Variables, all optional, all for the first installation: VOLUME (a directory, /var/lib/coffer/volume), DATABASE_URL (a PostgreSQL elsewhere,
# instead of Debian's on this machine), EDGE (options of `coffer edge install`, such as "--server-name media.example.com --certificate ...").
set -euo pipefail
umask 022
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

# Once read, it is a secret in a file, and the command is to see it there.
database_url=${DATABASE_URL:-}
unset DATABASE_URL

source_tree=$(cd "$(dirname "$0")/.." && pwd)
opt=/opt/coffer etc=/etc/coffer var=/var/lib/coffer
# Below /etc, units are an administrator's: overrides, and masks for what is never to run.
units=/usr/local/lib/systemd/system
account=coffer
kept_releases=2
timers=(audit scrub backup drill purge usage)
rehearsing=

say() { echo "coffer: $*"; }
fail() { echo "coffer: $*" >&2; exit 1; }

# Does a step, or tells it. What only looks is called without this.
run() { if [[ -n $rehearsing ]]; then echo "would run:$(printf ' %q' "$@")"; else "$@"; fi; }

# Writes standard input to a file, whole or not at all, if it differs: write MODE OWNER PATH
write() {
  local mode=$1 owner=$2 path=$3 text
  text=$(cat; echo .)
  if [[ -e $path && "$(cat "$path"; echo .)" == "$text" ]]; then return; fi
  if [[ -n $rehearsing ]]; then echo "would write: $path"; return; fi
  [[ -d $(dirname "$path") ]] || install -d -m 755 "$(dirname "$path")"
  install -m "$mode" -o "${owner%:*}" -g "${owner#*:}" /dev/null "$path.draft"
  printf %s "${text%.}" >"$path.draft"
  sync "$path.draft"
  mv "$path.draft" "$path"
  changed+=("$path")
}
changed=()

coffer() { /usr/local/bin/coffer "$@"; }

# The release's name: what is in it decides, so the same code is never installed twice.
release_files() { find server ops sql systemd Makefile README.md pyproject.toml requirements.lock -type f ! -path '*/__pycache__/*' -print0 | sort -z; }
release_id() { (cd "$source_tree" && version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) && release_files | xargs -0 sha256sum | sha256sum | sed "s/^\(.\{12\}\).*/$version-\1/"); }

check_machine() {
  [[ -z $rehearsing ]] || return 0
  [[ $(id -u) == 0 ]] || fail "this needs root: sudo make $command"
  [[ -d /run/systemd/system ]] || fail "this machine does not run systemd; ops/cron/coffer.crontab is for those, and the README for what else to do"
  command -v apt-get >/dev/null || fail "this is for Debian and what descends from it; the README says what a machine needs"
}

packages() {
  local missing=()
  python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3 python3-venv)
  command -v make >/dev/null || missing+=(make)
  command -v setpriv >/dev/null || missing+=(util-linux)
  if [[ -z $database_url && ! -e $etc/credentials/database_url ]]; then command -v pg_lsclusters >/dev/null || missing+=(postgresql); fi
  if ((${#missing[@]})); then
    say "installing Debian's packages: ${missing[*]}"
    run apt-get update -qq
    run apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  fi
}

accounts() {
  if ! getent passwd "$account" >/dev/null; then
    say "making the account $account"
    run adduser --quiet --system --group --home "$var" --no-create-home --shell /usr/sbin/nologin "$account"
  fi
  run install -d -m 755 "$opt" "$opt/releases"
  run install -d -m 750 -o root -g "$account" "$etc"
  run install -d -m 700 -o "$account" -g "$account" "$etc/credentials"
  # Passed through by nginx's workers, who are in the group.
  run install -d -m 750 -o "$account" -g "$account" "$var" "$var/metrics"
}

# Unpacks the code and makes its virtual environment; the last step is a rename, so a release is whole or not there.
release() {
  id=$(release_id)
  new=$opt/releases/$id
  # Whole, and with a Python that is still there: a new version of Debian brings another one.
  if [[ -e $new/.complete ]] && "$new/.venv/bin/python" -I -c 'import server' 2>/dev/null; then say "release $id is here already"; return; fi
  say "making release $id in $new; the first time this takes a minute or two"
  run rm -rf "$new"
  run install -d -m 755 "$new"
  if [[ -n $rehearsing ]]; then echo "would copy the code to $new and install requirements.lock into $new/.venv"; return; fi
  (cd "$source_tree" && release_files | tar -c --null -T -) | tar -x -C "$new" --no-same-owner
  # Not after this checkout's own wishes: a release is made by its own Makefile.
  env -u MAKEFLAGS -u MAKELEVEL make --silent -C "$new" .venv/.worker-python3 PYTHON=python3
  "$new/.venv/bin/python" -m compileall -q "$new/server" "$new/ops"
  touch "$new/.complete"
}

# Debian's PostgreSQL, reached by its socket: who may be `coffer` there is told by the account, so there is no password.
database() {
  if [[ -e $etc/credentials/database_url ]]; then return; fi
  if [[ -n $database_url ]]; then write 600 "$account:$account" "$etc/credentials/database_url" <<<"$database_url"; return; fi
  say "making the database coffer in Debian's PostgreSQL"
  if [[ -n $rehearsing ]]; then echo "would make role and database coffer, and let root and $account be that role (pg_hba.conf, pg_ident.conf)"; return; fi
  systemctl start postgresql
  postgres() { runuser -u postgres -- psql -XAtqc "$1"; }
  local tries=0 hba ident port
  until postgres 'select 1' >/dev/null 2>&1; do ((++tries < 60)) || fail "PostgreSQL does not start: journalctl -u 'postgresql@*'"; sleep 1; done
  [[ $(postgres "select count(*) from pg_roles where rolname = 'coffer'") == 1 ]] || postgres 'create role coffer login'
  # A drill restores a backup to a database of its own.
  postgres 'alter role coffer createdb'
  [[ $(postgres "select count(*) from pg_database where datname = 'coffer'") == 1 ]] || postgres "create database coffer owner coffer encoding 'UTF8' template template0"
  hba=$(postgres 'show hba_file') ident=$(postgres 'show ident_file') port=$(postgres 'show port')
  grep -q '^coffer ' "$ident" || printf 'coffer %s coffer\ncoffer root coffer\n' "$account" >>"$ident"
  # The first line that fits decides.
  grep -q 'map=coffer' "$hba" || sed -i '1i local coffer coffer peer map=coffer' "$hba"
  postgres 'select pg_reload_conf()' >/dev/null
  write 600 "$account:$account" "$etc/credentials/database_url" <<<"postgresql://coffer@/coffer?host=/var/run/postgresql&port=$port"
}

settings() {
  if [[ ! -e $etc/credentials/link_keys ]]; then
    write 600 "$account:$account" "$etc/credentials/link_keys" < <(head -c 32 /dev/urandom | base64)
  fi
  if [[ ! -e $etc/coffer.env ]]; then
    # What nginx's options say already.
    local public_url='#COFFER_PUBLIC_URL=' accel='#COFFER_ACCEL_REDIRECT_PREFIX=/coffer-files'
    if [[ ${EDGE:-} =~ --server-name[=\ ]+([^ ]+) && $EDGE == *--certificate* ]]; then public_url="COFFER_PUBLIC_URL=https://${BASH_REMATCH[1]}"; fi
    [[ -z ${EDGE:-} ]] || accel=${accel#\#}
    write 640 "root:$account" "$etc/coffer.env" <<TEXT
# Coffer's settings, for its services and the \`coffer\` command: NAME=value, in single quotes where there are spaces or quotes in it.
# All of them: coffer config. After a change: make install, which has it taken up without a refused request.
# Secrets (database_url, link_keys) are files in credentials/ beside this.

# Where browsers reach this server, such as https://media.example.com
$public_url

# nginx on this machine says who its clients are, and is told whose links were revoked.
COFFER_TRUSTED_PROXIES=127.0.0.1
COFFER_EDGE_STATE_FILE=/run/coffer/edge
# It sends owners' downloads, too, if it is the one of \`coffer edge install\`.
$accel

# Metrics of the tools, for Prometheus' textfile collector.
COFFER_METRICS_DIRECTORY=/var/lib/coffer/metrics
TEXT
  fi
  [[ -z ${EDGE:-} ]] || write 644 root:root "$etc/edge.options" <<<"$EDGE"
}

point_to_release() {
  run ln -sfn "releases/$id" "$opt/current.new"
  run mv -T "$opt/current.new" "$opt/current"
  write 755 root:root /usr/local/bin/coffer <"$source_tree/ops/coffer.sh"
}

install_units() {
  local unit relative before=${#changed[@]}
  while IFS= read -r relative; do
    write 644 root:root "$units/$relative" <"$source_tree/systemd/$relative"
  done < <(cd "$source_tree/systemd" && find . -type f ! -path './examples/*' -printf '%P\n' | sort)
  socket_address
  credentials
  if [[ -n $rehearsing ]] || ((${#changed[@]} > before)); then run systemctl daemon-reload; fi
}

# The socket unit says where to listen; the settings may say otherwise.
socket_address() {
  [[ -r $etc/coffer.env ]] || return 0
  local host port
  host=$(. "$etc/coffer.env"; echo "${COFFER_HOST:-127.0.0.1}") port=$(. "$etc/coffer.env"; echo "${COFFER_PORT:-3001}")
  [[ $host != *:* ]] || host="[$host]"
  if [[ $host:$port != 127.0.0.1:3001 || -e $units/coffer-api.socket.d/10-address.conf ]]; then
    write 644 root:root "$units/coffer-api.socket.d/10-address.conf" <<<"# From COFFER_HOST and COFFER_PORT, by \`make install\`.
[Socket]
ListenStream=
ListenStream=$host:$port"
  fi
}

# A unit is given the secrets that it uses: those of backups only backups, and those of Hetzner nobody but root's command.
credentials() {
  local path common= backups= unit
  for path in "$etc"/credentials/*; do
    [[ -f $path ]] || continue
    case ${path##*/} in
      *.draft | hetzner_*) ;;
      backup_*) backups+="LoadCredential=${path##*/}:$path"$'\n' ;;
      *) common+="LoadCredential=${path##*/}:$path"$'\n' ;;
    esac
  done
  write 644 root:root "$units/coffer-.service.d/15-credentials.conf" < <(printf '# By `make install`, from what is in %s.\n[Service]\n%s' "$etc/credentials" "$common")
  for unit in backup drill; do
    write 644 root:root "$units/coffer-$unit.service.d/16-credentials.conf" < <(printf '# By `make install`.\n[Service]\n%s' "$backups")
  done
}

migrate() {
  say "bringing the database to this release's schema"
  run coffer migrate
}

first_volume() {
  local volume=${VOLUME:-$var/volume}
  if [[ -n $rehearsing ]]; then echo "would make $volume a volume, if there is none"; return; fi
  [[ -z $(coffer volume list --json) ]] || return 0
  [[ -d $volume ]] || install -d -m 750 -o "$account" -g "$account" "$volume"
  chown "$account:$account" "$volume"
  say "making $volume the first volume"
  coffer volume init "$volume" >/dev/null
}

# The units that are enabled: always those of the server and the worker, and the timer of each tool that this release has.
enabled_units() {
  local tool
  printf '%s\n' coffer.target coffer-api.socket coffer-api.service coffer-worker.service
  for tool in "${timers[@]}"; do
    if [[ -n $rehearsing ]] || "$opt/current/.venv/bin/coffer" "$tool" --help >/dev/null 2>&1; then echo "coffer-$tool.timer"; fi
  done
}

enable_units() {
  local unit
  for unit in $(enabled_units); do
    if [[ $(systemctl is-enabled "$unit" 2>/dev/null || true) == masked ]]; then say "$unit is masked, and stays so"; continue; fi
    run systemctl enable --quiet "$unit"
    # A timer that came with an upgrade; the others are started by the target.
    [[ $unit != *.timer ]] || run systemctl start "$unit"
  done
}

edge() {
  command -v nginx >/dev/null || { say "there is no nginx; once there is (apt-get install nginx libnginx-mod-http-lua), run this again"; return 0; }
  if [[ -n $rehearsing ]]; then echo "would run: coffer edge install $(cat "$etc/edge.options" 2>/dev/null) --for-real"; return; fi
  local is_new=
  id -nG www-data | grep -qw "$account" || { adduser --quiet www-data "$account"; is_new=yes; }
  # Debian's example listens on port 80, too, and is asked first where no name is given. One that somebody has changed stays.
  local example=/etc/nginx/sites-enabled/default package
  if [[ -L $example ]] && package=$(dpkg-query --search "$(readlink -f "$example")" 2>/dev/null) && ! dpkg --verify "${package%%:*}" | grep -q sites-available/default; then
    say "taking Debian's example out of nginx's sites ($example)"
    rm "$example"
    is_new=yes
  fi
  # A reload closes idle connections, on which somebody may just be sending: not without a need.
  if [[ -n $is_new ]] || ! coffer edge check >/dev/null 2>&1; then
    coffer edge install --for-real >/dev/null || { say "nginx was left as it is; for its options, such as --server-name, set EDGE= or write $etc/edge.options"; return 0; }
  fi
  systemctl is-active --quiet nginx || say "nginx does not run: systemctl enable --now nginx"
}

wait_ready() {
  [[ -z $rehearsing ]] || return 0
  local url tries=0
  url=$(systemctl show coffer-api.socket --property=Listen --value | sed 's/ .*//')
  until curl -fsS --max-time 5 "http://$url/health/ready" >/dev/null 2>&1 || python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "http://$url/health/ready" 2>/dev/null; do
    ((++tries < 60)) || fail "the server does not become ready: journalctl -u coffer-api, coffer doctor"
    sleep 0.5
  done
  say "ready at http://$url"
}

forget_old_releases() {
  local old
  # shellcheck disable=SC2012 # our own names, by age
  for old in $(cd "$opt/releases" 2>/dev/null && ls -t | grep -vx "$id" | tail -n "+$kept_releases"); do
    say "removing the old release $old"
    run rm -rf "${opt:?}/releases/$old"
  done
}

# A second server of the new release, on the same socket, answers while the first one finishes its requests, stops and is started anew.
replace_server() {
  local standby=coffer-api-standby.service
  say "starting a new server beside the old one, which finishes its requests"
  if [[ -n $rehearsing ]]; then echo "would start $standby, restart coffer-api.service, stop $standby"; return; fi
  install -m 644 "$units/coffer-api.service" "/run/systemd/system/$standby"
  ln -sfn "$units/coffer-api.service.d" "/run/systemd/system/$standby.d"
  systemctl daemon-reload
  trap 'systemctl stop coffer-api-standby.service; rm -f /run/systemd/system/coffer-api-standby.service{,.d}; systemctl daemon-reload' EXIT
  if ! systemctl start "$standby"; then
    ln -sfn "${previous:-$(readlink "$opt/current")}" "$opt/current.new" && mv -T "$opt/current.new" "$opt/current"
    fail "the new server does not start, so the old one goes on with its release: journalctl -u $standby"
  fi
  systemctl restart coffer-api.service
  systemctl stop "$standby" 2>/dev/null  # it warns that a request may start a server, which is the point
  rm -f "/run/systemd/system/$standby" "/run/systemd/system/$standby.d"
  systemctl daemon-reload
  trap - EXIT
}

# What runs is to run by the settings, secrets and units as they are now.
renew_running() {
  local since
  [[ -z $rehearsing ]] && systemctl is-active --quiet coffer-api.service || return 0
  if [[ " ${changed[*]} " == *" $units/coffer-api.socket.d/10-address.conf "* ]]; then
    say "taking the new address"
    systemctl stop coffer-api.socket coffer-api.service
    systemctl restart coffer-worker.service
    return
  fi
  since=$(systemctl show coffer-api.service --property=ActiveEnterTimestamp --value --timestamp=unix)
  if [[ " ${changed[*]} " == *" $units/"* || -n $(find "$etc/coffer.env" "$etc/credentials" -newermt "$since") ]]; then
    replace_server
    systemctl restart coffer-worker.service
  fi
}

install_all() {
  packages
  accounts
  release
  database
  settings
  if [[ -e $opt/current && $(readlink "$opt/current") != "releases/$id" ]] && systemctl is-active --quiet coffer-api.service; then
    upgrade_running
    return
  fi
  point_to_release
  migrate
  first_volume
  install_units
  enable_units
  renew_running
  run systemctl start coffer.target coffer-api.socket coffer-api.service coffer-worker.service
  wait_ready
  edge
  forget_old_releases
  say "installed. A key for your app: coffer key create NAME --scope files:read --scope files:write --scope links:write; is all well: coffer doctor"
}

upgrade_running() {
  # The new code's schema serves the old code, too: migrations only add, and a changed function gets a new name.
  previous=$(readlink "$opt/current")
  point_to_release
  migrate
  install_units
  enable_units
  replace_server
  say "restarting the worker, which finishes its jobs"
  run systemctl restart coffer-worker.service
  wait_ready
  edge
  forget_old_releases
  say "upgraded to release $id"
}

upgrade() {
  [[ -e $opt/current ]] || fail "nothing is installed here; make install"
  release
  if [[ $(readlink "$opt/current") == "releases/$id" ]]; then say "this release is in use already; units and settings are looked after"; install_all; return; fi
  upgrade_running
}

uninstall() {
  local unit
  while IFS= read -r unit; do
    [[ ! -e $units/$unit ]] || run systemctl disable --quiet --now "$unit" 2>/dev/null || true
  done < <(cd "$source_tree/systemd" && printf '%s\n' coffer.target *.timer *.socket *.service)
  while IFS= read -r unit; do run rm -f "$units/$unit"; done < <(cd "$source_tree/systemd" && find . -type f ! -path './examples/*' -printf '%P\n')
  run rm -f "$units/coffer-api.socket.d/10-address.conf" "$units"/coffer-*.service.d/1[56]-credentials.conf /usr/local/bin/coffer
  [[ ! -d $units ]] || run find "$units" -maxdepth 1 -name 'coffer-*.d' -empty -delete
  run rm -rf "$opt"
  if [[ -e /etc/nginx/conf.d/coffer.conf ]]; then
    run rm -rf /etc/nginx/conf.d/coffer.conf /etc/nginx/coffer
    run systemctl try-reload-or-restart nginx
  fi
  run systemctl daemon-reload
  say "uninstalled. Kept: $etc, $var and other volumes, the database coffer, the account $account; make install takes them up again"
}

[[ ${1:-} != --rehearse ]] || { rehearsing=yes; shift; }
command=${1:-}
case $command in
  install) check_machine; install_all ;;
  upgrade) check_machine; upgrade ;;
  uninstall) check_machine; uninstall ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
