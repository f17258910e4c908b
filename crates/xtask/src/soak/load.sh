# load.sh VOLUME CONTROL POSTGRES_BINARIES: everything that works on the volume during `cargo xtask soak`, in one tree of processes.
#
# Says that it works by CONTROL/ready, works until CONTROL/stop is there, writes one JSON object for each part to CONTROL/*.json, and says by CONTROL/done that those are
# complete.
set -u
volume=$1 control=$2 binaries=$3
cd "$control"
# The directory goes with whoever measures, even if that is killed.
working() { [ -e load.py ] && [ ! -e stop ]; }
as_postgres() { setpriv --reuid postgres --regid postgres --clear-groups "$@"; }

install -d -o postgres -m 700 "$volume/pg" "$control/pg"
mkdir "$volume/fio"
as_postgres "$binaries/initdb" -D "$volume/pg" -U postgres -A trust --data-checksums >initdb.log 2>&1 || exit 1
# Not by the function: its pid would be a shell's.
setpriv --reuid postgres --regid postgres --clear-groups "$binaries/postgres" -D "$volume/pg" -k "$control/pg" -c listen_addresses= \
    -c shared_buffers=32MB -c max_connections=20 -c checkpoint_timeout=30s >postgres.log 2>&1 &
postgres=$!
echo $postgres >postgres.pid
bench() { as_postgres "$binaries/pgbench" -h "$control/pg" -U postgres "$@" postgres; }
until as_postgres "$binaries/pg_isready" -q -h "$control/pg"; do
    [ -d /proc/$postgres ] || exit 1
    sleep 0.1
done
bench -i -q -s 2 >pgbench-init.log 2>&1 || exit 1

python3 load.py sqlite "$volume" "$control" 1 2>sqlite-1.log & one=$!
python3 load.py sqlite "$volume" "$control" 2 2>sqlite-2.log & two=$!
python3 load.py prober "$volume" "$control" 1 2>prober-1.log & three=$!
echo $one $two $three >workers.pid
(
    runs=0 errors=0
    while working; do
        fio --output=fio.log fio.job || { errors=$((errors + 1)); cp fio.log "fio-failed-$errors.log"; }
        runs=$((runs + 1))
    done
    echo "{\"operations\": $runs, \"errors\": $errors}" >fio-1.json
) 2>fio-errors.log & four=$!
(
    transactions=0 errors=0
    while working; do
        bench -n -c 4 -j 1 -T 10 -R 100 >pgbench.log 2>&1 || { errors=$((errors + 1)); cp pgbench.log "pgbench-failed-$errors.log"; sleep 1; }
        transactions=$((transactions + $(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' pgbench.log | grep . || echo 0)))
        errors=$((errors + $(sed -n 's/^number of failed transactions: \([0-9]*\).*/\1/p' pgbench.log | grep . || echo 0)))
    done
    # What every transaction adds to an account it adds to the history.
    same=$(as_postgres "$binaries/psql" -h "$control/pg" -U postgres -Atc \
        'select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)' postgres 2>psql.log)
    [ "$same" = t ] || { errors=$((errors + 1)); echo "the sums say ${same:-nothing}" >>psql.log; }
    echo "{\"operations\": $transactions, \"errors\": $errors}" >pgbench-1.json
) & five=$!
# What SQLite opens while attached stays on the hook until it is closed, because of its locks: this is to be seen from the other side only.
until ! working || [ -e sqlite-1.works ] && [ -e sqlite-2.works ] && [ -e prober-1.works ]; do
    sleep 0.1
done
touch ready
wait $one $two $three $four $five
kill -INT $postgres
wait $postgres
touch done
