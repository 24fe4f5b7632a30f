"""Keep a run's record in nbs/_results, for the README and the results pages.

    python benchmarks/store.py RUN NAME            settings, metrics and history of one run
    python benchmarks/store.py --compare BASE RUN … NAME   what `comparison` finds about several, the first the base
    python benchmarks/store.py --grid OUT NAME     results.json of a grid
    python benchmarks/store.py --floors RUN NAME   what the counted baselines reached under a run's protocol

Ranks and weights stay behind: ranks.npz says which item each user chose, and some data sets may not be passed on.
"""
import argparse, shutil
from pathlib import Path
from seqrec_nb.compare import comparison
from seqrec_nb.files import write_json
from seqrec_nb.runs import read_json

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'_results'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', type=Path); p.add_argument('name')
    for way in ('compare', 'grid', 'floors'): p.add_argument(f'--{way}', action='store_true')
    a = p.parse_args()
    if a.grid: return write_json(RESULTS/f'{a.name}.json', read_json(a.runs[0]/'results.json'))
    if a.floors: return write_json(RESULTS/f'{a.name}.json', {n: b['test_metrics'] for n, b in read_json(a.runs[0]/'metrics.json')['baselines'].items()})
    if a.compare: return write_json(RESULTS/f'{a.name}.json', comparison({r.name: r for r in a.runs}))
    out = RESULTS/a.name
    out.mkdir(parents=True, exist_ok=True)
    for f in ('experiment.json', 'metrics.json', 'history.jsonl'): shutil.copyfile(a.runs[0]/f, out/f)


if __name__ == '__main__': main()
