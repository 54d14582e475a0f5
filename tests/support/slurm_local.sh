#!/usr/bin/env bash
# A real SLURM (slurmctld and N slurmd) on this machine, as root, in namespaces of its own: no systemd, no cgroups, no port or file of the host.
#   slurm_local.sh hold N       the cluster's whole life: prints "up", and ends with its standard input, or with whoever started it
#   slurm_local.sh node I       inside: start slurmd of node I
#   slurm_local.sh kill-node I  inside: kill -9 it
# State below $SLURM_LOCAL. Nodes are n1..nN, at addresses of their own. Needs the packages slurm-wlm and munge, and unshare.
set -euo pipefail
S=${SLURM_LOCAL:?a folder for the state}
export SLURM_CONF=$S/etc/slurm.conf
HOST=slurm

# Binaries by path: slurm-wlm-emulator takes over the plain names. Under their plain argv[0]: SLURM asks "am I slurmd?" by program name.
node() {
    mkdir -p "$S/spool/n$1"
    (exec -a slurmd /usr/sbin/slurmd-wlm -d /usr/sbin/slurmstepd-wlm -N "n$1" -f "$SLURM_CONF")
}

configure() {
    local i
    echo "127.0.0.1 localhost $HOST" > "$S/etc/hosts"
    cat > "$SLURM_CONF" << CONF
ClusterName=local
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$S/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$S/ctld
SlurmdSpoolDir=$S/spool/%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd.%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd.%n.log
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=30
KillWait=5
MinJobAge=3600
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=16 RealMemory=65536 State=UNKNOWN
CONF
    for i in $(seq 1 "$1"); do
        echo "10.77.1.$((10 + i)) n$i" >> "$S/etc/hosts"
        echo "NodeName=n$i NodeHostname=$HOST NodeAddr=10.77.1.$((10 + i)) Port=$((17000 + i))" >> "$SLURM_CONF"
    done
    echo "PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >> "$SLURM_CONF"
}

# Inside the namespaces, as their first process: whatever becomes of it, the kernel ends all others and undoes the mounts.
inside() {
    mkdir -p "$S"/{etc,ctld,spool,log,run}
    chmod 755 "$S" "$S"/*
    head -c 128 /dev/urandom > "$S/etc/munge.key"
    chmod 600 "$S/etc/munge.key"
    configure "$1"
    hostname "$HOST"
    mount --bind "$S/etc/hosts" /etc/hosts
    ip link set lo up
    for i in $(seq 1 "$1"); do ip addr add "10.77.1.$((10 + i))/32" dev lo; done # not 127.0.0.0/8: srun listens only where there is another network
    munged --force --key-file="$S/etc/munge.key" --socket="$S/run/munge.socket" --pid-file="$S/run/munged.pid" \
        --log-file="$S/log/munged.log" --seed-file="$S/run/munge.seed" --num-threads=2
    (exec -a slurmctld /usr/sbin/slurmctld-wlm -i -f "$SLURM_CONF")
    for i in $(seq 1 "$1"); do node "$i"; done
    local deadline=$((SECONDS + 300))
    until [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = "$1" ]; do
        [ "$SECONDS" -lt "$deadline" ] || { tail -n 5 "$S"/log/*.log >&2; exit 1; }
        sleep .2
    done
    echo up
    while read -r _; do :; done
}

case ${1:-} in
    hold) exec unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$0" inside "$2" ;;
    inside) inside "$2" ;;
    node) node "$2" ;;
    kill-node) kill -9 "$(cat "$S/run/slurmd.n$2.pid")" ;;
    *) sed -n '2,6s/^# //p' "$0" >&2 && exit 64 ;;
esac
