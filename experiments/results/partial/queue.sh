cd /work/helpers/tq; export PYTHONPATH=$PWD OMP_NUM_THREADS=1; PY="/work/main/.venv/bin/python -W ignore"; M=runs/q
case $1 in
A) $PY -m experiments.uci --methods tuned_momentum --sets energy --seed 1000 --starts 200 --jobs 1 --data-dir /work/shared/data/uci --out $M/uci_energy
   $PY -m experiments.invariance --seed 1000 --starts 5 --seeds 3 --jobs 1 --pools experiments/results --out $M/invariance
   $PY -m experiments.robustness --seed 1000 --cases lr_10 lr_100 spikes nan --jobs 1 --out $M/robustness
   $PY -m experiments.uci --methods tuned_momentum --sets power --seed 1000 --starts 200 --jobs 1 --data-dir /work/shared/data/uci --out $M/uci_power;;
B) $PY -m experiments.uci --methods tuned_momentum --sets kin8nm --seed 1000 --starts 200 --jobs 1 --data-dir /work/shared/data/uci --out $M/uci_kin8nm
   $PY -m experiments.fashion_mnist --methods tuned_momentum --starts 100 --seed 1000 --jobs 1 --out $M/fashion
   $PY -m experiments.fashion_mnist --methods tuned --starts 100 --seed 1000 --jobs 1 --out $M/fashion_tuned;;
esac
