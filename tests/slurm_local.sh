#!/usr/bin/env bash
# A real SLURM cluster (slurmctld + N slurmd) on one host, no systemd, no cgroups, as root. Appends its names to /etc/hosts, and removes its own lines.
#   slurm_local.sh up [N=2] | down | env        state below $SLURM_LOCAL (default ./state)
# Names n1..nN resolve to 127.0.0.(10+i): one loopback address per node.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
S=${SLURM_LOCAL:-$HERE/state}
CPUS=${SLURM_LOCAL_CPUS:-4}; GPUS=${SLURM_LOCAL_GPUS:-2}
export SLURM_CONF=$S/etc/slurm.conf

# The -wlm binaries by path (slurm-wlm-emulator takes over the plain names), under their plain argv[0]: SLURM asks
# "am I slurmctld/slurmd?" by program name, and under another name silently drops Gres.
node() { mkdir -p "$S/spool/n$1"; (exec -a slurmd /usr/sbin/slurmd-wlm -d /usr/sbin/slurmstepd-wlm -N "n$1" -f "$SLURM_CONF"); }

up() {
  local n=${1:-2}
  mkdir -p "$S"/{etc,ctld,spool,log,run,dev}; chmod 755 "$S" "$S"/*
  [ -s "$S/etc/munge.key" ] || { head -c 128 /dev/urandom > "$S/etc/munge.key"; chmod 600 "$S/etc/munge.key"; }
  for i in $(seq 1 "$n"); do                       # names -> loopback addresses
    grep -q " n$i # slurm_local" /etc/hosts || echo "127.0.0.$((10+i)) n$i # slurm_local" >> /etc/hosts
  done
  for g in $(seq 0 $((GPUS-1))); do [ -e "$S/dev/gpu$g" ] || mknod "$S/dev/gpu$g" c 1 3; done
  cat > "$S/etc/slurm.conf" <<C
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
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
JobCompType=jobcomp/filetxt
JobCompLoc=$S/log/jobcomp.txt
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=$CPUS RealMemory=8000 State=UNKNOWN
C
  for i in $(seq 1 "$n"); do
    echo "NodeName=n$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.$((10+i)) Port=$((17000+i)) Gres=gpu:$GPUS" >> "$S/etc/slurm.conf"
  done
  echo "PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >> "$S/etc/slurm.conf"
  echo "Name=gpu File=$S/dev/gpu[0-$((GPUS-1))]" > "$S/etc/gres.conf"
  munged --force --key-file="$S/etc/munge.key" --socket="$S/run/munge.socket" --pid-file="$S/run/munged.pid" \
         --log-file="$S/log/munged.log" --seed-file="$S/run/munge.seed" --num-threads=2
  (exec -a slurmctld /usr/sbin/slurmctld-wlm -i -f "$SLURM_CONF")
  for i in $(seq 1 "$n"); do node "$i"; done
  for _ in $(seq 100); do
    [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" = "$n" ] && { sinfo -N -l; return 0; }; sleep .2
  done
  echo "slurm did not come up" >&2; tail -5 "$S"/log/*.log >&2; return 1
}
down() {
  scancel -u root 2>/dev/null || true; sleep 1
  for p in "$S"/run/slurmd.*.pid "$S/run/slurmctld.pid" "$S/run/munged.pid"; do
    [ -s "$p" ] && kill "$(cat "$p")" 2>/dev/null || true
  done
  for _ in $(seq 50); do ls "$S"/run/*.pid >/dev/null 2>&1 || break; sleep .1; done
  sed -i '/# slurm_local$/d' /etc/hosts 2>/dev/null || true
}
case ${1:-} in node) node "$2";; kill-node) kill -9 "$(cat "$S/run/slurmd.n$2.pid")";; up) up "${2:-2}";; down) down;; env) echo "export SLURM_CONF=$SLURM_CONF";; *) echo "usage: up [N]|down|env|node I|kill-node I"; exit 2;; esac
