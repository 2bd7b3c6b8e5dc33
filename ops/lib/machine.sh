# What ops/demo and ops/test ask of the machine: packages, a Rust toolchain, PostgreSQL's programs, stand-ins for
# AWS, migration tools.
# Sourced, not run. Asks for root (through sudo) only when a package is really missing.
# shellcheck shell=bash

# Rust older than this does not build the workspace (rust-version in Cargo.toml).
RUST_MINOR_MIN=94
# PostgreSQL's first supported major version.
PG_MAJOR_MIN=14
# The stand-ins for AWS that the tests were written against.
MOTO_VERSION=5.2.5
KINESALITE_VERSION=3.3.3
# The migration tool that the tests run.
DJANGO_VERSION=5.2.8
PSYCOPG_VERSION=3.2.12

if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
    BOLD=$'\e[1m' DIM=$'\e[2m' RED=$'\e[31m' GREEN=$'\e[32m' PLAIN=$'\e[0m'
else
    BOLD='' DIM='' RED='' GREEN='' PLAIN=''
fi

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "needs root for: $* (no sudo here; run that as root, then start me again)"
    fi
}

apt_install() {
    command -v apt-get >/dev/null || die "needs the packages: $* (apt-get is not here; install them by your system's means)"
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -o DPkg::Lock::Timeout=300 -qq -y --no-install-recommends install "$@" </dev/null
}

# Debian's server package creates and starts a cluster of its own the first time it is installed. We
# need the programs only, so that is switched off while we install and the file put back afterwards.
install_postgresql_server() {
    local conf=/etc/postgresql-common/createcluster.conf kept status=0
    apt_install postgresql-common
    kept=$(mktemp)
    cp "$conf" "$kept"
    printf '\ncreate_main_cluster = false\n' | as_root tee -a "$conf" >/dev/null
    apt_install postgresql postgresql-client postgresql-contrib || status=$?
    as_root cp "$kept" "$conf"
    rm -f "$kept"
    return $status
}

# Prints the directory of PostgreSQL's programs: DR_AGENT_PG_BIN, else the newest under
# /usr/lib/postgresql, else where pg_config points. Fails where there is none with everything.
find_pg_bin() {
    local dir candidates=()
    if [[ -n ${DR_AGENT_PG_BIN:-} ]]; then
        candidates=("$DR_AGENT_PG_BIN")
    else
        while IFS= read -r dir; do
            candidates+=("$dir")
        done < <(printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV)
        if command -v pg_config >/dev/null; then
            candidates+=("$(pg_config --bindir)")
        fi
    fi
    for dir in ${candidates[@]+"${candidates[@]}"}; do
        if [[ -x $dir/initdb && -x $dir/postgres && -x $dir/pg_ctl && -x $dir/psql &&
            -x $dir/pgbench && -x $dir/pg_dump && -x $dir/pg_restore ]]; then
            printf '%s\n' "$dir"
            return 0
        fi
    done
    return 1
}

# Installs what is missing and sets PG_BIN. Runs apt-get update only when something is missing.
provide_packages() {
    local missing=() tool
    command -v cc >/dev/null || missing+=(build-essential)
    command -v setpriv >/dev/null || missing+=(util-linux)
    for tool in "$@"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    PG_BIN=$(find_pg_bin) || PG_BIN=''
    if [[ -z $PG_BIN && -n ${DR_AGENT_PG_BIN:-} ]]; then
        die "DR_AGENT_PG_BIN=$DR_AGENT_PG_BIN lacks initdb, postgres, pg_ctl, psql, pgbench, pg_dump or pg_restore"
    fi
    if ((${#missing[@]})) || [[ -z $PG_BIN ]]; then
        command -v apt-get >/dev/null ||
            die "PostgreSQL $PG_MAJOR_MIN or newer (server and client) ${missing[*]:+and ${missing[*]} }must be installed first; there is no apt-get here to do it"
        as_root apt-get -o DPkg::Lock::Timeout=300 -qq update </dev/null
        if ((${#missing[@]})); then
            apt_install "${missing[@]}"
        fi
        if [[ -z $PG_BIN ]]; then
            install_postgresql_server
            PG_BIN=$(find_pg_bin) || die "PostgreSQL was installed, but its programs are not under /usr/lib/postgresql"
        fi
    fi
    local version
    version=$("$PG_BIN/postgres" --version)
    [[ $version =~ ([0-9]+) ]] || die "cannot read the version in: $version"
    ((BASH_REMATCH[1] >= PG_MAJOR_MIN)) ||
        die "$version is too old; PostgreSQL $PG_MAJOR_MIN or newer is needed (set DR_AGENT_PG_BIN to its bin directory)"
    PG_VERSION=$version
}

# Links with mold where it is or can be had: a quarter of a minute less for every large binary. Without it everything
# works as well, only later.
use_fast_linker() {
    command -v mold >/dev/null || apt_install mold >/dev/null 2>&1 || true
    if command -v mold >/dev/null; then
        export RUSTFLAGS="${RUSTFLAGS:+$RUSTFLAGS }-C link-arg=-fuse-ld=mold"
    fi
}

# Puts what stands in for AWS in the tests into a directory of its own, target/aws-stand-ins: moto_server (S3 and
# Kinesis) into a virtual environment there, and kinesalite (Kinesis) below. The last step of each names the version,
# so an interrupted or older one is made anew.
provide_aws_stand_ins() {
    # moto first: it clears the directory.
    provide_moto target/aws-stand-ins
    provide_kinesalite target/aws-stand-ins
}

provide_moto() {
    local dir=$1
    [[ -e $dir/moto-$MOTO_VERSION ]] && return
    if ! python3 -c 'import ensurepip' 2>/dev/null; then
        as_root apt-get -o DPkg::Lock::Timeout=300 -qq update </dev/null
        apt_install python3 python3-venv
    fi
    rm -rf "$dir"
    python3 -m venv "$dir"
    # Not moto[server]: that is all of AWS, and half a minute. Without crc32c moto returns other checksums.
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "moto[s3crc32c]==$MOTO_VERSION" flask flask-cors
    touch "$dir/moto-$MOTO_VERSION"
}

provide_kinesalite() {
    local dir=$1
    [[ -e $dir/kinesalite-$KINESALITE_VERSION ]] && return
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        as_root apt-get -o DPkg::Lock::Timeout=300 -qq update </dev/null
        apt_install nodejs npm
    fi
    rm -rf "$dir/kinesalite"
    mkdir -p "$dir/kinesalite"
    # Without optional packages: they would keep streams on a disk, and need a compiler.
    npm install --prefix "$dir/kinesalite" --silent --no-audit --no-fund --omit=optional \
        "kinesalite@$KINESALITE_VERSION" </dev/null
    touch "$dir/kinesalite-$KINESALITE_VERSION"
}

# Puts the migration tools of the tests into a virtual environment, target/migration-tools.
provide_migration_tools() {
    local dir=target/migration-tools mark
    mark=$dir/django-$DJANGO_VERSION-psycopg-$PSYCOPG_VERSION
    [[ -e $mark ]] && return
    if ! python3 -c 'import ensurepip' 2>/dev/null; then
        as_root apt-get -o DPkg::Lock::Timeout=300 -qq update </dev/null
        apt_install python3 python3-venv
    fi
    rm -rf "$dir"
    python3 -m venv "$dir"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check \
        "django==$DJANGO_VERSION" "psycopg[binary]==$PSYCOPG_VERSION"
    touch "$mark"
}

# Finds cargo, also where rustup put it but the shell does not look.
provide_cargo() {
    if ! command -v cargo >/dev/null && [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]]; then
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    fi
    command -v cargo >/dev/null || die "no Rust toolchain here; install one from https://rustup.rs"
    local version
    version=$(rustc --version)
    [[ $version =~ ^rustc\ 1\.([0-9]+) ]] && ((BASH_REMATCH[1] >= RUST_MINOR_MIN)) ||
        die "$version is too old; Rust 1.$RUST_MINOR_MIN or newer is needed (rustup update)"
}
