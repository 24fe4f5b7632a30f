"What the collector of the phase page computes, on numbers whose answer is known."
import importlib.util, json, sys
import numpy as np, pytest
from conftest import ROOT
from seqrec_nb.analysis.significance import over_seeds
from seqrec_nb.data import synthetic

@pytest.fixture(scope='module')
def records():
    spec = importlib.util.spec_from_file_location('phase_records', ROOT/'benchmarks'/'phase_records.py')
    sys.modules['phase_records'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules['phase_records']

def put(root, table, row, seed, **settings):
    "A run directory as far as the collector looks for it"
    out = root/table/f'{row}-s{seed}'
    (out/'best').mkdir(parents=True)
    e = dict(model='sasrec_bsa', data='lastfm', protocol='P-bsa', samples='all', window='random', batch_size=32)
    (out/'experiment.json').write_text(json.dumps({**e, **settings, 'name': f'{row}-s{seed}', 'seed': seed}))
    (out/'metrics.json').write_text(json.dumps({'stopped': 'finished'}))
    return out

def test_runs_are_found_named_and_ordered(records, tmp_path):
    for seed in (1, 0): put(tmp_path, 'b', 'other', seed, model='pswrec_v13')
    put(tmp_path, 'b', 'sasrec_bsa', 0); put(tmp_path, 'c', 'other', 0, model='pswrec_v13', lr=.1)
    (put(tmp_path, 'b', 'open', 0)/'metrics.json').unlink()
    (tmp_path/'repo/nbs/_results/old').mkdir(parents=True)
    runs = records.named(records.find(tmp_path))
    rows = records.rows_of(runs)
    assert {n: [*s] for n, s in rows.items()} == {'sasrec_bsa': [0], 'other': [0, 1], 'other (c)': [0]}
    assert records.missing(rows, {'other': [0, 1, 2], 'sasrec_bsa': [0], 'new': [0]}) == {'other': [2], 'new': [0]}

def test_rows_are_grouped_by_their_training_with_the_control_first(records, tmp_path):
    put(tmp_path, 'a', 'sasrec_bsa', 0); put(tmp_path, 'a', 'phase', 0, model='pswrec_v13')
    prefix = dict(samples='prefix_bsa', window=None, batch_size=256)
    put(tmp_path, 'b', 'filter', 0, model='wearec', **prefix); put(tmp_path, 'b', 'plain', 0, **prefix)
    found = records.regimes(records.rows_of(records.find(tmp_path)))
    assert [[*x] for x in found.values()] == [['sasrec_bsa', 'phase'], ['plain', 'filter']]

def test_slope_is_that_of_the_line(records):
    x, noise = [-5, -4.5, -4], np.random.default_rng(0).normal(size=(1, 2, 300))
    flat, steep = np.zeros((3, 2, 300)) + noise, noise + .1 * np.array(x)[:, None, None]
    assert records.slope(x, flat)['slope'] == pytest.approx(0, abs=1e-12)
    assert records.slope(x, steep)['slope'] == pytest.approx(.1)
    mixed = steep + np.random.default_rng(1).normal(size=steep.shape) * .01
    low, high = records.slope(x, mixed)['interval']
    assert low < .1 < high and low > 0

def test_numbers_are_plain_and_short(records):
    made = records.plain({1: np.float32(1 / 3), 'n': np.arange(2), 'x': (float('nan'), True, None)})
    assert made == {'1': .33333, 'n': [0, 1], 'x': [None, True, None]} and json.dumps(made)

def test_spread_over_seeds(records):
    made = records.spread([dict(head=[0, 1], strength=[1., 2.]), dict(head=[0, 1], strength=[3., 2.])], ['head'])
    assert made['index'] == [[0], [1]] and [*made['mean']['strength']] == [2, 2]
    assert [*made['least']['strength']] == [1, 2] and [*made['most']['strength']] == [3, 2]

def test_the_invented_history_is_of_known_items_and_nobodys(records):
    data = synthetic(60)
    h = records.invented(data, 20)
    items, _ = data.train.flat()
    assert len(set(h)) == 20 and set(h) <= set(items) and (h == records.invented(data, 20)).all()

def test_what_is_turned_off(records):
    assert records.sums(['phase', 'bias']) == ['phase', 'bias']
    assert records.sums(['phase', 'amplitude'])[-1] == 'phase+amplitude'

def test_an_estimate_has_both_intervals(records):
    x = np.random.default_rng(0).normal(1, 1, (5, 400))
    e = records.estimate(x)
    assert e['interval'][0] < e['mean'] < e['interval'][1] and e['n'] == 400
    assert e['over_seeds'] == over_seeds(x, 0 * x)['interval']
