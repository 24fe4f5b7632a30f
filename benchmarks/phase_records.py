"""What the runs of the phase family say, for nbs/results/06_phase: sums and means over users, never a user, never an item.

    python benchmarks/phase_records.py RUNS [--out nbs/_results/phase] [--cache RUNS/.records]

RUNS holds folders of runs (as `seqrec grid TABLE --out RUNS/TABLE` makes them) and perhaps the tables, RUNS/TABLE.csv. Everything
that is finished is read, what is not is listed as missing (of these tables and the library's own), so the command may be repeated at any time; rankings that it has to make
(models without a part, histories with an item exchanged) are kept in the cache, by the sha256 of the checkpoint. One file a subject:

    tracker-DATA.json      the rows against their control and against the requirement's best; slopes; what is missing
    curves-DATA.json       validation by epoch
    training-DATA.json     models trained in more than one way: seconds, epochs, what came of it
    ablation-DATA.json     parts turned off in the stored best checkpoints
    looks-DATA.json        strengths, amplitudes, speeds of phases; pictures of one model and one invented history
    sensitivity-DATA.json  one of the last items exchanged
    pace-DATA.json         users with short and long times between their items
    checkpoints.json       path, size, sha256, epoch and commit of every run
"""
import argparse, os
from pathlib import Path
from typing import NamedTuple
import numpy as np, pandas as pd, torch
from seqrec_nb.analysis.ablation import ablate, ablation, parts, without
from seqrec_nb.analysis.pace import clocked, gaps_from, paces, user_gap
from seqrec_nb.analysis.phase import amplitudes, attending, attention_of, looks, phase_speed, phases_of, responses, strengths
from seqrec_nb.analysis.sensitivity import disturbed, octaves
from seqrec_nb.analysis.significance import contrast, holm, level, mean_test, over_seeds, per_seed
from seqrec_nb.callbacks import read_history
from seqrec_nb.cells import read_seeds
from seqrec_nb.compare import STRICT, but_seed, comparison, differing
from seqrec_nb.core import fold
from seqrec_nb.data import EvalLoader
from seqrec_nb.designs import TABLES
from seqrec_nb.evaluate import evaluating, ranks
from seqrec_nb.experiment import load_run, read_metrics
from seqrec_nb.files import write_json
from seqrec_nb.grid import open_table
from seqrec_nb.metrics import Ranks, bootstrap, members, per_user
from seqrec_nb.runs import read_json
import seqrec_nb.designs_phase                                    # its tables

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'_results'/'phase'
BASE, BEST, METRIC = 'sasrec_bsa', 'norot_-5', 'NDCG@10'    # the control (a row and its model), the requirement's best
TIMES = {'lastfm': 'timed/LastFM_with_dates.tsv', 'beauty': 'timed/Beauty_timedelta.txt',
         'sports': 'timed/Sports_and_Outdoors_timedelta.txt', 'toys': 'timed/Toys_and_Games_timedelta.txt'}

# ---- which runs there are ----

class Run(NamedTuple):
    "A finished run"
    table: str # folder below RUNS
    row: str
    seed: int
    path: Path
    data: str

def find(root: Path) -> list[Run]:
    "All finished runs of the tables below a folder"
    found = []
    for file in sorted([*root.glob('*/*/metrics.json'), *root.glob('*/*.candidates/*/metrics.json')]):
        e, m = read_json(file.parent/'experiment.json'), read_json(file)
        if not (e and m and (file.parent/'best').exists()) or m.get('stopped') == 'counted': continue
        row = str(e['name']).removesuffix(f"-s{e['seed']}")
        found.append(Run(file.relative_to(root).parts[0], row, e['seed'], file.parent, Path(str(e['data'])).stem))
    return found

def wanted(root: Path) -> dict:
    "{data: {row: seeds}} of the library's own tables and of those in the folder"
    found = {}
    for source in ['phase', 'phase-prefix', 'phase-beauty', *sorted(root.glob('*.csv'))]:
        for cells in open_table(source)[2].to_dict('records'):
            of = found.setdefault(Path(cells['data']).stem, {})
            of[cells['name']] = sorted({*of.get(cells['name'], ()), *read_seeds(cells.get('seeds') or 0)})
    return found

def named(runs: list) -> list[Run]:
    "The same, where rows of one name that differ in their settings say which table they are of; the first keeps its name"
    kind = lambda r: but_seed(r.path)
    first = {}
    for r in runs: first.setdefault((r.data, r.row), kind(r))
    return [r if kind(r) == first[r.data, r.row] else r._replace(row=f'{r.row} ({r.table})') for r in runs]

def rows_of(runs: list, order=()) -> dict: # order: names of rows
    "{row: {seed: path}}, the base first, then in the order given; of a seed that is there twice the first"
    found = {}
    for r in runs: found.setdefault(r.row, {}).setdefault(r.seed, r.path)
    place = {n: k for k, n in enumerate(dict.fromkeys([BASE, *order]))}
    return {n: dict(sorted(s.items())) for n, s in sorted(found.items(), key=lambda x: (place.get(x[0], len(place)), x[0]))}

def missing(rows: dict, want: dict) -> dict: # want: {row: seeds}
    "{row: seeds without a result}"
    left = {n: [s for s in seeds if s not in rows.get(n, ())] for n, seeds in want.items()}
    return {n: s for n, s in left.items() if s}

def settings(rows: dict) -> dict:
    "{row: its experiment}"
    return {n: read_json(next(iter(s.values()))/'experiment.json') for n, s in rows.items()}

def regimes(rows: dict) -> dict:
    "{how the rows were trained: rows}, the base's first; the control of that training leads each"
    e, found = settings(rows), {}
    for n, x in e.items():
        way = f"{x['samples']} positions, {x['window']} window" if x['samples'] == 'all' else x['samples']
        found.setdefault(f"{way}, batch {x['batch_size']}", []).append(n)
    control = lambda n: (e[n]['model'] != BASE, [*rows].index(n))
    return {k: {n: rows[n] for n in sorted(names, key=control)} for k, names in found.items()}

# ---- comparisons ----

def plain(x, digits: int = 5):
    "The same without numpy, with so many significant digits"
    if isinstance(x, dict): return {str(k): plain(v, digits) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v, digits) for v in x]
    if isinstance(x, np.ndarray): return plain(x.tolist(), digits)
    if isinstance(x, pd.DataFrame): return {c: plain([*x[c]], digits) for c in x}
    if isinstance(x, (bool, np.bool_)): return bool(x)
    if isinstance(x, np.integer): return int(x)
    if isinstance(x, (float, np.floating)): return float(f'{x:.{digits}g}') if np.isfinite(x) else None
    return x

def compared(rows: dict) -> dict: # {row: {seed: path}}; the first is the base
    "Their comparison; how a row is trained and what it is made of is the question, its budget and loss are not"
    paths = {n: [*s.values()] for n, s in rows.items()}
    strict = {k for names in STRICT.values() for k in names} - {'batch_size'}
    return comparison(paths, METRIC, [k for k in differing(paths) if k not in strict | {'seed'}])

def loaded(rows: dict) -> dict:
    "{row: Ranks by seed} of the test"
    return {n: [Ranks.load(s[k]/'ranks.npz') for k in sorted(s)] for n, s in rows.items()}

def slope(
    x, # (K,) settings
    y  # (K,S,U) the metric of each user, by setting and seed
) -> dict:
    "How much the metric rises for one unit of the setting: least squares, intervals over users and over seeds"
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y)
    each = np.tensordot(x / (x @ x), y, 1)                                         # (S,U)
    sure = over_seeds(each, np.zeros_like(each))['interval']
    return dict(slope=float(each.mean()), interval=bootstrap(each.mean(0)), over_seeds=sure, p=mean_test(each.mean(0)),
                seeds=len(each), settings=(x + 0).tolist())

def slopes(found: dict, of_row: dict) -> dict: # found: row -> Ranks by seed; of_row: row -> experiment
    "Of the phase bias, and of the gate's threshold and width (per doubling), among rows that differ in nothing else"
    def of(model, name, take=float):
        rows = [n for n, e in of_row.items() if e['model'] == model and e.get(name) is not None]
        n = min((len(found[r]) for r in rows), default=0)
        if len({of_row[r][name] for r in rows}) < 2: return None
        y = np.stack([per_seed(found[r][:n], METRIC) for r in rows])
        return dict(rows=rows, **slope([take(of_row[r][name]) for r in rows], y))
    made = dict(phase_bias=of('pswrec_v13_norot', 'phase_bias'), gate_tau=of('pswrec_softmag', 'gate_tau', np.log2),
                gate_temperature=of('pswrec_softmag', 'gate_temperature', np.log2))
    made = {n: s for n, s in made.items() if s}
    for s, p in zip(made.values(), holm([s['p'] for s in made.values()])): s['holm'] = p
    return made

HIDDEN = 'seed', 'name', 'device', 'threads', 'preset', 'max_minutes', 'save_every'

def tracker(rows: dict, data: str, want: dict) -> dict:
    "The rows of one data set, compared with the control that was trained as they were, and with the base"
    e, found, paths = settings(rows), loaded(rows), {n: [*s.values()] for n, s in rows.items()}
    m = read_metrics(next(iter(paths.values()))[0])
    out = dict(data=data, **{k: m[k] for k in ('protocol', 'fingerprint', 'n_users', 'n_items', 'n_interactions')},
               floors={n: b['test_metrics'] for n, b in m['baselines'].items()}, missing=missing(rows, want), rows={})
    for n, s in rows.items():
        of = [read_metrics(p) for p in s.values()]
        out['rows'][n] = {k: v for k, v in e[n].items() if k not in HIDDEN} | dict(
            seeds=[*s], parameters=of[0]['parameters'], best_epochs=[x['best_epoch'] for x in of], stopped=[x['stopped'] for x in of],
            valid=[x['valid_metrics'][METRIC] for x in of], levels={k: level(per_seed(found[n], k), k) for k in ('HR@10', METRIC)},
            test={k: [x['test_metrics'][k] for x in of] for k in of[0]['test_metrics']})
    parts = regimes(rows)
    out['regimes'] = {k: compared(x) for k, x in parts.items() if len(x) > 1 and e[next(iter(x))]['model'] == BASE}
    if BASE not in rows: return out
    own = next(x for x in parts.values() if BASE in x)
    away = {n: s for n, s in rows.items() if n not in own}
    if away: out['across'] = compared({BASE: rows[BASE], **away})
    psw = {n: s for n, s in own.items() if e[n]['model'].startswith('psw') and n != BEST}
    if psw and BEST in own: out['against_best'] = compared({BEST: own[BEST], **psw})
    out['slopes'] = slopes({n: found[n] for n in own}, {n: e[n] for n in own})
    return out

def curves(rows: dict) -> dict:
    "{row: [validation by epoch, for each seed]}"
    of = lambda p: [h['valid'][METRIC] for h in read_history(p/'history.jsonl') if 'valid' in h]
    return {n: plain([of(p) for p in s.values()], 3) for n, s in rows.items()}

# ---- training on prefixes ----

def training(path: Path) -> dict:
    "What a run's training cost and reached"
    h, m = read_history(path/'history.jsonl'), read_metrics(path)
    valid = [(x['epoch'], x['valid'][METRIC]) for x in h if 'valid' in x]
    return dict(seconds=float(np.median([x['seconds'] for x in h])), targets=h[0]['targets'], epochs=len(h),
                steps=h[0]['step'], train_s=m['timings']['train_s'], best_epoch=m['best_epoch'], valid=m['valid_metrics'][METRIC],
                test=m['test_metrics'][METRIC], to_best=float(sum(x['seconds'] for x in h if x['epoch'] <= m['best_epoch'])),
                curve=plain([v for _, v in valid], 4))

def trainings(rows: dict) -> dict:
    "Models that were trained in more than one way: each row against the one that has the base's way"
    e, ways = settings(rows), [*regimes(rows).values()]
    key = lambda n: (e[n]['model'], e[n].get('phase_bias'))
    first = {}
    for n in (n for x in ways for n in x): first.setdefault(key(n), n)
    pairs = {n: first[key(n)] for x in ways[1:] for n in x if first[key(n)] != n}
    out = dict(rows={}, pairs={})
    for n, base in pairs.items():
        out['rows'] |= {k: dict(settings=e[k], runs=[training(p) for p in rows[k].values()]) for k in (base, n)}
        both = sorted({*rows[n]} & {*rows[base]})
        if both: out['pairs'][n] = dict(base=base, seeds=both, comparison=compared({k: {s: rows[k][s] for s in both} for k in (base, n)}))
    return out

# ---- what needs the models ----

class Cache:
    "Rankings and small results of a checkpoint, made once"
    def __init__(self, folder: Path): self.folder = folder; folder.mkdir(parents=True, exist_ok=True)
    def ranks(self, key: str, make) -> dict: # make: () -> {name: Ranks}
        folder = self.folder/key
        if not (folder/'names.json').exists():
            folder.mkdir(exist_ok=True)
            made = make()
            for k, r in enumerate(made.values()): r.save(folder/f'{k}.npz')
            write_json(folder/'names.json', {'names': [*made]})
        return {n: Ranks.load(folder/f'{k}.npz') for k, n in enumerate(read_json(folder/'names.json')['names'])}
    def json(self, key: str, make) -> dict:
        file = self.folder/f'{key}.json'
        if not file.exists(): write_json(file, plain(make(), 6))
        return read_json(file)

class Best:
    "The best checkpoint of a run, loaded when it is wanted"
    def __init__(self, run: Run, cache: Cache):
        self.run, self.cache = run, cache
        self.sha = read_metrics(run.path)['checkpoint']['sha256'][:16]
        self._it = None
    @property
    def it(self):
        if self._it is None:
            e, data, model = load_run(self.run.path)
            self._it = model.cpu(), data, EvalLoader(data.test, e.max_len)
        return self._it
    def ablated(self) -> dict:
        "{'whole': Ranks, part: Ranks without it, …}"
        def make():
            model, _, loader = self.it
            return ablate(model, loader, sums(parts(model)))
        return self.cache.ranks(f'{self.sha}-ablation', make)
    def exchanged(self) -> dict:
        "{'1 before': Ranks, '1 after': …} of the first to the third item from the end"
        def make():
            model, _, loader = self.it
            return {f'{k} {when}': r for k, pair in disturbed(model, loader).items() for when, r in zip(('before', 'after'), pair)}
        return self.cache.ranks(f'{self.sha}-exchange', make)
    def meanings(self) -> dict: return self.cache.json(f'{self.sha}-parts', lambda: parts(self.it[0]))
    def look(self) -> dict: return self.cache.json(f'{self.sha}-looks', lambda: look(self.it[0], self.it[2]))
    def picture(self) -> dict: return self.cache.json(f'{self.sha}-picture', lambda: picture(*self.it))

def sums(there) -> list[str]: # names of parts
    "What is turned off: every part alone, phase and amplitude together"
    return [*there, *(['phase+amplitude'] if {'phase', 'amplitude'} <= {*there} else [])]

def ablations(best: dict) -> dict: # {row: {seed: Best}}
    "The metric without each part, and the paired change; all p values of the table corrected together"
    out = {}
    for n, of in best.items():
        each = [b.ablated() for b in of.values()]
        if len(each[0]) < 2: continue
        found = {k: [e[k] for e in each] for k in each[0]}
        table = ablation(found, METRIC).reset_index().to_dict('records')
        for line in table:
            a, b = found[line['without']], found['whole']
            line['over_seeds'] = over_seeds(per_seed(a, METRIC), per_seed(b, METRIC))['interval']
            line['ranks_changed'] = np.mean([(x.above != y.above).mean() for x, y in zip(a, b)])
        again = np.mean([(e['whole'].above == Ranks.load(b.run.path/'ranks.npz').above).mean() for e, b in zip(each, of.values())])
        out[n] = dict(seeds=[*of], meanings=next(iter(of.values())).meanings(), parts=table, same_ranks_again=float(again))
    lines = [x for r in out.values() for x in r['parts'] if x['without'] != 'whole']
    for x, p in zip(lines, holm([x['p'] for x in lines]) if lines else ()): x['holm'] = p
    return plain(out)

def look(model, loader) -> dict:
    "Strengths, amplitudes and phase speeds of a model, as far as it has them, and how much attention the bias moves"
    out = {}
    if not hasattr(model, 'bank'): return out
    for name, f in dict(strengths=lambda: strengths(model), speed=lambda: phase_speed(model, loader),
                        amplitudes=lambda: amplitudes(model, loader)).items():
        try: out[name] = plain(f())
        except ValueError: pass                                    # the model has no such thing
    if 'bias' in parts(model): out['moved'] = moved(model, loader)
    return out

def moved(model, loader, back: int = 20) -> list:
    "Of each layer: share of attention that the bias moves, and attention of the last item by distance with and without it"
    found = {}
    for b in loader:
        with torch.no_grad():
            for k, given in enumerate(attending(model, b)):
                real = given[2].real
                rows, last = torch.arange(len(real)), real.sum(1) - 1
                w = [looks(x, *given[1:])[rows, :, last].double() for x in (given[0], without(given[0], 'bias'))]  # (B,H,L)
                at = (last[:, None] - torch.arange(back)).clamp_min(0)[:, None].expand(-1, w[0].shape[1], -1)
                full = last >= back - 1
                shift = .5 * (w[0] - w[1]).abs().sum(-1).mean(1)
                found.setdefault(k, []).append([shift, *(x.gather(2, at).mean(1)[full] for x in w)])
    cat = [[torch.cat(x).numpy() for x in zip(*f)] for f in found.values()]
    return [dict(layer=k, share=float(s.mean()), interval=bootstrap(s), n=len(s), near=on.mean(0), near_without=off.mean(0),
                 users_near=len(on)) for k, (s, on, off) in enumerate(cat)]

def invented(data, n: int = 40, seed: int = 0) -> np.ndarray:
    "A history of nobody: items drawn by how often they occur in training, no item twice"
    items, _ = data.train.flat()
    count = np.bincount(items, minlength=data.n_items + 1)[1:]
    return 1 + np.random.default_rng(fold('invented', seed)).choice(data.n_items, n, replace=False, p=count / count.sum())

def picture(model, data, loader) -> dict:
    "Band responses, phases along an invented history, and where one head looks with and without the bias"
    history, out = invented(data), {}
    r = responses(model.bank, 129)
    out['responses'] = {int(s): x.gain for s, x in r[r.frequency >= 0].groupby('band')}
    out['phases'] = phases_of(model, history).drop(columns='item')
    if 'bias' in parts(model):
        on, off = (attention_of(model, history[:20], layer=0, head=0, off=x) for x in (None, 'bias'))
        out['attention'] = dict(on=on, difference=on - off)
    return out

def spread(frames: list, keys: list) -> dict: # frames: a table of each seed, as {column: list}
    "Mean, least and most over seeds, row by row"
    tables = [pd.DataFrame(f).set_index(keys) for f in frames]
    x = np.stack([t.to_numpy(float) for t in tables])
    named = lambda v, columns: {c: v[:, tables[0].columns.get_loc(c)] for c in columns if c in tables[0]}
    shown = 'strength', 'turn', 'median'
    return dict(index=[list(np.atleast_1d(i)) for i in tables[0].index], mean=named(x.mean(0), tables[0].columns),
                least=named(x.min(0), shown), most=named(x.max(0), shown))

def seen(best: dict) -> dict: # {row: {seed: Best}}
    "What has become of bands, phases, amplitudes and strengths: all seeds in numbers, one seed in pictures"
    out = {}
    for n, of in best.items():
        each = [b.look() for b in of.values()]
        if not each[0]: continue
        keys = dict(strengths=['layer', 'head'], speed=['band'], amplitudes=['layer', 'head'])
        out[n] = dict(seeds=[*of], **{k: spread([e[k] for e in each], i) for k, i in keys.items() if k in each[0]})
        if 'moved' in each[0]: out[n]['moved'] = [[layer['share'] for layer in e['moved']] for e in each]
        if n == BEST: out[n]['near'] = each[0]['moved']
    drawn = {n: next(iter(best[n].values())).picture() for n in (BEST, 'pswrec_v13') if n in best}
    return plain(dict(rows=out, pictures=drawn))

# ---- the last items; the times between items ----

def estimate(x) -> dict: # x: (S,U)
    "Mean, intervals over users and over seeds"
    x = np.atleast_2d(x)
    return dict(mean=float(x.mean()), interval=bootstrap(x.mean(0)), over_seeds=over_seeds(x, np.zeros_like(x))['interval'], n=x.shape[1])

def sensitivities(best: dict) -> dict: # {row: {seed: Best}}
    "How far the target's rank moves when the k-th item from the end is exchanged, and that against the base"
    out, doubled = {}, {}
    for n, of in best.items():
        each = [b.exchanged() for b in of.values()]
        for k in sorted({x.split()[0] for x in each[0]}):
            pairs = [(e[f'{k} before'], e[f'{k} after']) for e in each]
            doubled[n, k] = np.stack([octaves(*p) for p in pairs])
            change = {m: np.stack([per_user(b, m) - per_user(a, m) for a, b in pairs]) for m in ('HR@10', METRIC)}
            out.setdefault(n, dict(seeds=[*of], back={}))['back'][k] = dict(
                octaves=estimate(doubled[n, k]), **{f'{m} change': estimate(x) for m, x in change.items()})
    for (n, k), x in doubled.items():
        y = doubled.get((BASE, k))
        if n == BASE or y is None: continue
        d = x.mean(0) - y.mean(0)
        out[n]['back'][k]['minus_base'] = dict(mean=float(d.mean()), interval=bootstrap(d), over_seeds=over_seeds(x, y)['interval'], p=mean_test(d))
    gaps = [b['minus_base'] for r in out.values() for b in r['back'].values() if 'minus_base' in b]
    for g, p in zip(gaps, holm([g['p'] for g in gaps]) if gaps else ()): g['holm'] = p
    return plain(out)

def by_pace(rows: dict, data, seconds: np.ndarray) -> dict: # rows: {row: {seed: path}}
    "Fast, medium and slow users: how many, how fast, each row's metric there, and its difference to the base"
    timed = {n: [clocked(r, seconds) for r in of] for n, of in loaded(rows).items()}
    first = next(iter(timed.values()))[0]
    whole = Ranks.load(next(iter(next(iter(rows.values())).values()))/'ranks.npz')
    length = whole.length[np.isfinite(seconds[whole.user])]
    out = dict(groups={}, rows={})
    for g, of in members(first, paces(first)).items():
        out['groups'][g] = dict(n=int(of.sum()), days=[float(first.length[of].min() / 86400), float(first.length[of].max() / 86400)],
                                median_history=float(np.median(length[of])))
        for n, each in timed.items():
            here = [r.where(of) for r in each]
            cell = level(per_seed(here, METRIC), METRIC)
            if n != BASE and BASE in timed: cell['minus_base'] = contrast(here, [r.where(of) for r in timed[BASE]], METRIC)
            out['rows'].setdefault(n, {})[g] = cell
    return plain(out)

def checkpoints(runs: list, root: Path) -> list:
    "Where each model is, and how to know that it is the one"
    def line(r):
        m = read_metrics(r.path)
        c = m['checkpoint']
        return dict(run=r.path.relative_to(root).as_posix(), path=(r.path/c['path']).relative_to(root).as_posix(),
                    size=c['size'], sha256=c['sha256'], epoch=c['epoch'], saved=c['mtime'], commit=m['commit'], test=m['test_metrics'][METRIC])
    return plain([line(r) for r in runs], 12)

# ---- all of it ----

def records(root: Path, cache: Cache):
    "(name, record) one after the other"
    runs, want = named(find(root)), wanted(root)
    for data in dict.fromkeys([*(r.data for r in runs), *want]):
        rows = rows_of([r for r in runs if r.data == data], want.get(data, ()))
        if not rows:
            yield f'tracker-{data}', dict(data=data, rows={}, missing=want[data])
            continue
        yield f'tracker-{data}', tracker(rows, data, want.get(data, {}))
        yield f'curves-{data}', curves(rows)
        yield f'training-{data}', trainings(rows)
        best = {n: {k: Best(Run('', n, k, p, data), cache) for k, p in s.items()} for n, s in rows.items()}
        yield f'pace-{data}', timed(rows, data)
        yield f'ablation-{data}', ablations(best)
        yield f'looks-{data}', seen(best)
        yield f'sensitivity-{data}', sensitivities(best)
    yield 'checkpoints', dict(runs=checkpoints(runs, root))

def timed(rows: dict, data: str) -> dict:
    "Groups by pace (mean days: in months the median is nearly always 0), or why there are none"
    file = Path(os.environ.get('SEQREC_DATA', '.'))/TIMES.get(data, 'nowhere')
    if not file.exists(): return dict(refused=f'no times for {data}')
    d = load_run(next(iter(next(iter(rows.values())).values())))[1]
    return dict(source=TIMES[data], **by_pace(rows, d, user_gap(gaps_from(file, d.seqs), d.test, 'mean')))

def main(given=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', type=Path); p.add_argument('--out', type=Path, default=RESULTS); p.add_argument('--cache', type=Path)
    a = p.parse_args(given)
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    for name, found in records(a.runs, Cache(a.cache or a.runs/'.records')):
        write_json(a.out/f'{name}.json', plain(found, 7))
        print(f"{name}: {(a.out/f'{name}.json').stat().st_size:,} bytes", flush=True)


if __name__ == '__main__': main()
