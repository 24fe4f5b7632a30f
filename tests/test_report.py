"Reports, lists and examinations of runs: what they show, and what they must not hide."
import json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import needs_data
from seqrec_nb.data.splits import load
from seqrec_nb.experiment import Experiment, run
from seqrec_nb.files import RunLock
from seqrec_nb.report import against, differences, groups, load_metrics, render, report, split_report, table, tied, verdict
from seqrec_nb.runs import check_run, check_text, find_runs, runs_table, save_csv, state

def walks(path, users, seed=0):
    "A csv file of walks around a ring, histories of all groups"
    rng = np.random.default_rng(seed)
    n = rng.integers([5, 12, 52], [11, 40, 60], (users // 3, 3)).ravel()
    items = np.concatenate([(rng.integers(60) + rng.integers(1, 16, k).cumsum()) % 60 for k in n])
    frame = {'user': np.repeat(np.arange(len(n)), n), 'item': items, 'timestamp': np.arange(n.sum()) + 10**9}
    pd.DataFrame(frame).to_csv(path, index=False)
    return path

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a trained run and a baseline on one file, and a baseline on another"
    root = tmp_path_factory.mktemp('runs')
    one, two = walks(root/'one.csv', 90), walks(root/'two.csv', 60, seed=1)
    tiny = dict(d_model=16, n_blocks=1, max_len=20, batch_size=32, lr=5e-3, dropout=.1)
    run(Experiment(data=one, epochs=12, patience=3, **tiny), root/'runs/a')
    run(Experiment(model='markov', data=one), root/'runs/b')
    run(Experiment(model='popularity', data=two), root/'runs/c')
    return root/'runs'

@pytest.fixture
def runs(made, tmp_path):
    "A copy that a test may damage"
    return shutil.copytree(made, tmp_path/'runs')

def test_report_shows_what_belongs_to_a_figure(made):
    text, m = report(made/'a'), load_metrics(made/'a')
    assert max(map(len, text.splitlines())) <= 100
    for what in ('sasrec on one', 'P-raw', 'seed 0', m['fingerprint'][:12], 'popularity', 'markov', 'cooccurrence',
                 'HR@5', 'MRR@20', 'short (≤ 10)', 'long (> 50)', '95 %', f"{m['test_metrics']['NDCG@10']:.4f}",
                 m['checkpoint']['sha256'][:12], str(made/'a')): assert what in text
    assert len([l for l in text.splitlines() if l.strip()[:2] in ('1.', '2.', '3.', '4.', '5.')]) == 5
    assert all(str(v) != 'nan' for v in m['test_metrics'].values())

def test_report_as_markdown(made):
    text = report(made/'a', 'md')
    assert text.startswith('**sasrec on one') and sum(l.startswith('|---') for l in text.splitlines()) == 4
    widths = {len(l.split('|')) for l in text.splitlines() if l.startswith('|') and 'HR@5' in l}
    assert widths == {12}

def test_cells_of_markdown_cannot_break_the_table():
    assert table(['a', 'b'], [['x|y', '1']], 'md').splitlines()[-1] == '| x\\|y | 1 |'

def test_an_empty_group_is_shown(made):
    m = load_metrics(made/'a')
    none = dict.fromkeys(m['test_metrics'])
    m['grouped_metrics']['long'] = {**none, 'count': 0, 'hits@10': 0, 'interval': none}
    row = {r[0]: r for r in groups(m)[1]}['long (> 50)']
    assert row == ['long (> 50)', '0', '–', '–', '–', '–', '–']

def test_a_difference_is_resolved_or_not():
    d = lambda i: {'HR@10': dict(difference=.01, interval=i)}
    m = dict(model='x', paired=dict(a=d([-.1, .1]), b=d([.01, .1]), c=d([-.1, -.01]), e=d(None), f=d([0., .1])))
    assert [r[3] for r in differences(m, ['HR@10'])[1]] == ['not resolved', 'better', 'worse', 'not resolved', 'not resolved']

def test_a_baseline_is_not_compared_with_itself(made):
    text = report(made/'b')
    assert 'counted, not trained' in text and [r[0] for r in against(load_metrics(made/'b'))[1]].count('markov') == 1

def test_warnings_of_a_run_are_shown():
    text = render(['head'], [('part', ['line'])], ['the training loss did not fall ' * 8])
    assert '! the training loss did not fall' in text and max(map(len, text.splitlines())) <= 100

def test_no_report_without_results(runs):
    (runs/'a/metrics.json').unlink()
    with pytest.raises(FileNotFoundError, match='not finished'): report(runs/'a')
    with pytest.raises(FileNotFoundError, match='not a run directory'): report(runs)

def test_states(runs):
    assert state(runs/'a') == 'done'
    with RunLock(runs/'a'): assert state(runs/'a') == 'running'
    assert state(runs/'a') == 'done'
    (runs/'a/.lock').write_text('process 1 of a machine that lost power')
    assert state(runs/'a') == 'done'
    (runs/'a/metrics.json').unlink()
    assert state(runs/'a') == 'incomplete'
    with open(runs/'a/run.log', 'a') as f: f.write('2026-01-01 00:00:00 failed: NonFinite: step 3\n')
    assert state(runs/'a') == 'failed'

def test_table_of_runs(runs):
    (runs/'d').mkdir()
    (runs/'d/experiment.json').write_text(json.dumps(Experiment(data='ml-1m').to_dict()))
    (runs/'e').mkdir()
    (runs/'e/experiment.json').write_text('{"model": ')           # torn by a crash: listed, not fatal
    text = runs_table(runs)
    assert len(find_runs(runs)) == 5 and text.count('incomplete') == 2 and text.count('done') == 3
    scores = [r.metrics['test_metrics']['NDCG@10'] for r in find_runs(runs) if r.data == 'one']
    assert scores == sorted(scores, reverse=True) and len(scores) == 2
    assert runs_table(runs/'nowhere').startswith('no runs')

def test_results_of_different_tasks_are_not_put_together_silently(runs):
    assert '! data, protocol or fingerprint differ' in runs_table(runs)
    shutil.rmtree(runs/'c')
    assert '!' not in runs_table(runs)
    for change in ({'protocol': 'P-sas'}, {'fingerprint': 'f' * 64}):
        m, e = json.loads((runs/'b/metrics.json').read_text()), json.loads((runs/'b/experiment.json').read_text())
        (runs/'b/metrics.json').write_text(json.dumps({**m, **change}))
        (runs/'b/experiment.json').write_text(json.dumps({**e, **{k: v for k, v in change.items() if k in e}}))
        assert '! data, protocol or fingerprint differ' in runs_table(runs)
        (runs/'b/metrics.json').write_text(json.dumps(m)); (runs/'b/experiment.json').write_text(json.dumps(e))

def test_csv_files(runs):
    paths = {p.stem: pd.read_csv(p) for p in save_csv(runs)}
    assert set(paths) == {'overall_comparison', 'comparison_short', 'comparison_medium', 'comparison_long'}
    whole = paths['overall_comparison'].set_index('Run')
    assert len(whole) == 3 and np.isclose(whole.loc[str(runs/'a'), 'HR@10'], load_metrics(runs/'a')['test_metrics']['HR@10'])
    assert paths['comparison_short'].Users.tolist() and {'Protocol', 'Fingerprint'} <= set(whole.columns)

def gaps(run): return {c.name for c in check_run(run) if c.ok is False}
def changed(run, **kw):
    path = run/'metrics.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **kw}))

def test_a_good_run_has_no_gap(made):
    assert gaps(made/'a') == gaps(made/'b') == set() and 'GAP' not in check_text(check_run(made/'a'))

def test_gaps_are_found(runs):
    m = load_metrics(runs/'a')
    g, t = m['grouped_metrics'], m['test_metrics']
    wrong = [('data', dict(fingerprint=None)), ('groups', dict(grouped_metrics={k: v for k, v in g.items() if k != 'long'})),
             ('test metrics', dict(test_metrics={k: v for k, v in t.items() if k != 'MRR@20'})),
             ('test metrics', dict(test_metrics={**t, 'HR@20': 1.5})), ('stop', dict(stopped='interrupted')),
             ('groups', dict(grouped_metrics={**g, 'short': {**g['short'], 'count': g['short']['count'] + 1}})),
             ('best checkpoint', dict(checkpoint={**m['checkpoint'], 'sha256': '0' * 64})),
             ('best checkpoint', dict(best_epoch=m['best_epoch'] + 1)), ('ranks', dict(test_metrics={**t, 'HR@5': t['HR@5'] / 2}))]
    for name, change in wrong:
        changed(runs/'a', **change)
        assert name in gaps(runs/'a'), (name, change)
        (runs/'a/metrics.json').write_text(json.dumps(m))
    assert gaps(runs/'nowhere') == {'state'}

def test_damaged_files_are_gaps(runs):
    shutil.copy2(runs/'b/ranks.npz', runs/'a/ranks.npz')
    weights = bytearray((runs/'a/best/model.safetensors').read_bytes())
    weights[-1] ^= 1
    (runs/'a/best/model.safetensors').write_bytes(weights)
    history = [json.loads(l) for l in (runs/'a/history.jsonl').read_text().splitlines()]
    (runs/'a/history.jsonl').write_text(''.join(json.dumps({**h, 'loss': 1. + k}) + '\n' for k, h in enumerate(history)))
    assert gaps(runs/'a') == {'files', 'ranks', 'best checkpoint', 'loss'}
    shutil.rmtree(runs/'a/best')
    whole = (runs/'a/ranks.npz').read_bytes()
    for torn in (b'', whole[:len(whole) // 2], b'not a zip file'):
        (runs/'a/ranks.npz').write_bytes(torn)
        assert gaps(runs/'a') == {'files', 'ranks', 'best checkpoint', 'loss'}

def test_a_best_epoch_at_the_end_is_worth_a_look(runs):
    m, e = load_metrics(runs/'a'), json.loads((runs/'a/experiment.json').read_text())
    (runs/'a/experiment.json').write_text(json.dumps({**e, 'epochs': m['best_epoch']}))
    assert [c.ok for c in check_run(runs/'a') if c.name == 'best epoch'] == [None]

def test_ties_are_counted(tmp_path):
    (tmp_path/'x.csv').write_text('user,item,timestamp\n' + ''.join(
        f'{u},{i},{t}\n' for u, i, t in [(1, 1, 10**9), (1, 2, 10**9 + 5), (1, 3, 10**9 + 5), (2, 1, 10**9 + 5), (2, 2, 10**9 + 6), (2, 3, 10**9 + 7)]))
    data = load(tmp_path/'x.csv')
    assert tied(data) == (2 / 6, 1) and '1 of 2 test targets' in ' '.join(split_report(data).split())

@needs_data
@pytest.mark.parametrize('name, protocol, facts', [
    ('ml-1m', 'P-seed', ['6,034', '3,533', '575,272', '162 short', '2,579 medium', '3,293 long']),
    ('ml-100k', 'P-raw', ['943', '1,682', '100,000', '0 short', '415 of 943 test targets'])])
def test_real_data(name, protocol, facts, data_dir):
    text = ' '.join(split_report(load(name, protocol)).split())
    assert [f for f in facts if f not in text] == []

def test_a_hybrid_tells_its_weights():
    from seqrec_nb.report import fusion
    stats = {g: dict(mean=a, std=0., min=a, max=a, count=n) for g, a, n in (('short', .3, 7), ('long', None, 0))}
    head, rows = fusion(dict(alpha_stats=stats))
    assert rows == [['short (≤ 10)', '7', '0.3000', '0.0000', '0.3000', '0.3000'], ['long (> 50)', '0', '–', '0.0000', '–', '–']]
    assert len(head) == len(rows[0])
