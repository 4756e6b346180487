#!/bin/sh
# A Slurm cluster of this machine alone, for tests of srun: `.ci/slurm.sh start FOLDER && . FOLDER/env.sh`, `.ci/slurm.sh stop FOLDER`.
#
# Needs a privileged user and Debian's slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge. Its daemons keep all
# they write in FOLDER, but for munge's socket; `stop` ends those that `start` began.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: .ci/slurm.sh start|stop FOLDER" >&2
    exit 2
fi
mkdir -p "$2"
folder=$(cd "$2" && pwd)

if [ "$1" = stop ]; then
    for daemon in slurmd slurmctld munged; do
        if [ -s "$folder/$daemon.pid" ]; then
            kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
            rm -f "$folder/$daemon.pid"
        fi
    done
    exit 0
fi

host=$(hostname -s)
mkdir -p "$folder/state" "$folder/spool"
cat > "$folder/slurm.conf" <<END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmdSpoolDir=$folder/spool
StateSaveLocation=$folder/state
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# More tasks than cores.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
echo "export SLURM_CONF=$folder/slurm.conf" > "$folder/env.sh"
# shellcheck disable=SC1091
. "$folder/env.sh"
if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge
    chown munge:munge /run/munge
    runuser -u munge -- munged --force
    cp /run/munge/munged.pid "$folder/munged.pid"
fi
slurmctld -c
slurmd
# The node is there in a second or two.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    if [ "$(sinfo -h -o %t)" = idle ] && timeout 20 srun --mpi=pmix -n 2 true; then
        exit 0
    fi
    sleep 0.5
done
echo "the node starts nothing: $folder has the logs" >&2
exit 1
