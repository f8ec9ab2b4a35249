#!/usr/bin/env bash
# A SLURM cluster of two nodes with accounting, for tests: every daemon runs on this machine, as root, inside one folder.
#
#   cluster.sh missing          says what this machine lacks for it (exit code 1), or nothing
#   cluster.sh start FOLDER     starts it; then `export SLURM_CONF=FOLDER/slurm.conf` and use sbatch, srun, sacct ...
#   cluster.sh stop FOLDER      ends its jobs and daemons; logs and database stay in FOLDER
#
# Debian packages: slurm-wlm slurmdbd munge mariadb-server. Besides FOLDER only /etc/hosts is written: the names of the
# nodes, which torch.distributed looks up, for as long as the cluster runs. Ports are any that are free; several clusters
# can run at once.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

NODES=(slurmtest1 slurmtest2)
CPUS=4                     # of a node, whatever the machine has
GPUS=(/dev/null /dev/zero) # of a node: SLURM counts these files, and nothing uses them
RESTART_DELAY=5            # seconds until a requeued job starts again: the least that SLURM takes, whose default is 120
KILL_WAIT=30               # seconds between SIGTERM and SIGKILL, SLURM's default

missing() {
    local program
    [[ $(id -u) == 0 ]] || { echo "a SLURM cluster on one machine needs root" && return 1; }
    for program in munged mariadbd mariadb-install-db mariadb slurmdbd slurmctld slurmd sbatch sacct python3; do
        command -v "$program" >/dev/null || {
            echo "$program is not installed (Debian: apt-get install slurm-wlm slurmdbd munge mariadb-server)"
            return 1
        }
    done
    [[ -w /etc/hosts ]] || { echo "/etc/hosts, which must name the nodes, cannot be written" && return 1; }
}

until_true() { # seconds, what is waited for, command and arguments
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || { echo "cluster.sh: waited in vain for $what; see $folder/log" >&2 && return 1; }
        sleep 0.1
    done
}

free_ports() { # how many
    python3 -c '
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(server.getsockname()[1] for server in held))' "$1"
}

write_configuration() {
    local ports i
    read -ra ports < <(free_ports $((2 + ${#NODES[@]})))
    cat >"$folder/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
DbdHost=localhost
DbdPort=${ports[0]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/pid/slurmdbd
EOF
    chmod 600 "$folder/slurmdbd.conf"
    cat >"$folder/slurm.conf" <<EOF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=$RESTART_DELAY
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/pid/slurmctld
SlurmdPidFile=$folder/pid/slurmd-%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# processes are found by parentage and nothing is confined, so neither cgroups nor their file systems are needed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=${ports[0]}
AccountingStoragePass=$folder/munge/socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=$KILL_WAIT
ReturnToService=2
# a node has the processors and the memory that stand here, whatever slurmd finds
SlurmdParameters=config_overrides
EOF
    for i in "${!NODES[@]}"; do
        echo "NodeName=${NODES[i]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=${ports[2 + i]} CPUs=$CPUS Gres=gpu:${#GPUS[@]} RealMemory=4000"
    done >>"$folder/slurm.conf"
    printf 'Name=gpu File=%s\n' "${GPUS[@]}" >"$folder/gres.conf"
    cat >>"$folder/slurm.conf" <<EOF
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
# whose jobs must leave for those of the other one
PartitionName=spare Nodes=ALL PriorityTier=0 GraceTime=40 MaxTime=INFINITE State=UP
EOF
}

name_nodes() {
    printf '127.0.0.1 %s # %s\n' "${NODES[*]}" "$folder" >>/etc/hosts
}

unname_nodes() {
    local others
    others=$(grep -v -F -- "# $folder" /etc/hosts || true)
    printf '%s\n' "$others" >/etc/hosts # in place: containers mount this file, so it cannot be replaced
}

start_munge() {
    head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 600 "$folder/munge/key"
    munged --socket="$folder/munge/socket" --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" \
        --log-file="$folder/log/munged.log" --pid-file="$folder/pid/munged" --force >"$folder/log/munged.start" 2>&1
}

start_database() {
    mariadb-install-db --no-defaults --user=root --datadir="$folder/db" --skip-test-db --skip-name-resolve \
        --innodb-log-file-size=4M >"$folder/log/mariadb-install.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$folder/db" --socket="$MYSQL_UNIX_PORT" --skip-networking \
        --pid-file="$folder/pid/mariadbd" --innodb-buffer-pool-size=32M --innodb-log-file-size=4M \
        --innodb-flush-log-at-trx-commit=0 >"$folder/log/mariadbd.log" 2>&1 &
    until_true 60 "MariaDB" mariadb --no-defaults --user=root --execute "create database if not exists slurm"
}

start() {
    local node
    missing >&2
    mkdir -p "$folder"/{munge,db,log,pid,state}
    chmod 700 "$folder/munge"
    write_configuration
    name_nodes
    start_munge
    start_database
    slurmdbd
    until_true 60 "slurmdbd" sacctmgr --noheader list cluster
    sacctmgr --immediate add cluster test >/dev/null
    slurmctld -c
    for node in "${NODES[@]}"; do
        mkdir -p "$folder/spool-$node"
        slurmd -N "$node"
    done
    until_true 60 "both nodes" nodes_are_idle
}

nodes_are_idle() { [[ $(sinfo --noheader --states=idle --format=%D) == "${#NODES[@]}" ]]; }

stop() {
    if [[ -f $folder/pid/slurmctld ]] && scancel --signal=KILL --user=root; then # plain scancel gives them KILL_WAIT
        scancel --user=root || true
        until_true 20 "the end of the jobs" queue_is_empty || true
    fi
    stop_daemons "${NODES[@]/#/slurmd-}" slurmctld
    stop_daemons slurmdbd # which still takes in what slurmctld tells last
    stop_daemons mariadbd munged
    unname_nodes
}

queue_is_empty() { [[ -z $(squeue --noheader) ]]; }

stop_daemons() { # names
    local name pids=()
    for name in "$@"; do
        if [[ -f $folder/pid/$name ]]; then pids+=("$(<"$folder/pid/$name")"); fi
    done
    ((${#pids[@]})) || return 0
    kill "${pids[@]}" 2>/dev/null || true
    until_true 20 "the end of $*" none_is_running "${pids[@]}" || kill -KILL "${pids[@]}" 2>/dev/null || true
}

none_is_running() { # process ids
    local pid
    for pid in "$@"; do
        if kill -0 "$pid"; then return 1; fi
    done
}

if [[ ${1:-} == missing ]]; then
    missing
elif [[ (${1:-} == start || ${1:-} == stop) && -n ${2:-} ]]; then
    mkdir -p "$2"
    folder=$(cd "$2" && pwd -P)
    export SLURM_CONF=$folder/slurm.conf MYSQL_UNIX_PORT=$folder/db/socket
    "$1"
else
    echo "usage: $0 missing | start FOLDER | stop FOLDER" >&2
    exit 2
fi
