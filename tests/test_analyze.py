"Folders of runs as tables, figures and files: what belongs together, what does not, and what is missing."
import json, shutil
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import save_file
from seqrec_nb.analysis.fusion import alpha_stats
from seqrec_nb.analyze import analyze, task_folder
from seqrec_nb.blocks.fusion import make_fusion
from seqrec_nb.figures import fusions, save_figures
from seqrec_nb.metrics import Ranks, summary
from seqrec_nb.report import table
from seqrec_nb.runs import find_runs
from seqrec_nb.tables import overall, sections, tables
from test_analysis import Model, made

def fake(path, seed=0, better_until=0, n=120, fingerprint='f' * 64, history=3, **settings):
    "A finished run directory, without data or training"
    e = dict(model='sasrec', data='made-up', protocol='P-raw', seed=seed, epochs=20) | settings
    ranks = made(n, 10 + seed, better_until)
    m = dict(summary(ranks), best_epoch=2, best_val_metric=.05 + seed / 100, monitor='NDCG@10', stopped='finished',
             fingerprint=fingerprint, n_users=n, n_items=950)
    path.mkdir(parents=True); ranks.save(path/'ranks.npz')
    if kind := e.get('fusion_type'):
        m['alpha_stats'] = alpha_stats(Model(kind), ranks)
        (path/'best').mkdir()
        f = make_fusion(kind)
        for p in f.parameters(): p.data += .5
        save_file({f'fusion.{k}': v for k, v in f.state_dict().items()} | {'item.weight': torch.zeros(3, 2)}, path/'best/model.safetensors')
    lines = [dict(epoch=k + 1, loss=2. - k, valid={'NDCG@10': .04 + k / 100} if k % 2 else None) for k in range(history)]
    (path/'history.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    for name, x in (('experiment', e), ('metrics', m)): (path/f'{name}.json').write_text(json.dumps(x))
    return path

def rewrite(run, drop=(), **kw):
    path = run/'metrics.json'
    m = {**json.loads(path.read_text()), **kw}
    path.write_text(json.dumps({k: v for k, v in m.items() if k not in drop}))

@pytest.fixture(scope='module')
def made_runs(tmp_path_factory):
    "Two models of two seeds under folder names of all kinds, another task, a run that is not finished"
    root = tmp_path_factory.mktemp('runs')/'runs'
    fake(root/'sasrec_20260217_083601', 0); fake(root/'sasrec', 1)
    fake(root/'deep/er/x', 0, 20, model='hybrid_learnable', fusion_type='learnable')
    fake(root/'hybrid_learnable_20260217_095648', 1, 20, model='hybrid_learnable', fusion_type='learnable')
    fake(root/'other', 0, data='other', model='markov', fingerprint='e' * 64)
    (root/'later').mkdir(); (root/'later/experiment.json').write_text('{"model": "sasrec", "data": "made-up"}')
    text = analyze(root, save_csv=True)
    return root, text

@pytest.fixture
def runs(made_runs, tmp_path):
    "A copy that a test may damage"
    return shutil.copytree(made_runs[0], tmp_path/'runs', ignore=shutil.ignore_patterns('analysis'))

def test_rows_are_models_and_sections_are_tasks(made_runs):
    root, text = made_runs
    one, two = sections(find_runs(root))
    assert {r.name: len(r.runs) for r in one.rows} == {'sasrec': 2, 'hybrid_learnable': 2}
    assert one.base.name == 'sasrec' and two.base is None and [r.name for r in two.rows] == ['markov']
    scores = [r.metric() for r in one.rows]
    assert scores == sorted(scores, reverse=True)
    each = [r.metrics['test_metrics']['NDCG@10'] for r in one.base.runs]
    assert np.isclose(one.base.metric(), np.mean(each)) and f'{np.mean(each):.4f}' in text

def test_text_says_what_is_missing(made_runs):
    root, text = made_runs
    assert f'not in the tables: {root/"later"} (incomplete)' in text
    assert 'no finished run of sasrec: no change in per cent' in text and text.count('change against sasrec') == 2
    assert 'not resolved (2 seeds < 5)' in text and 'α, the weight' in text

def test_files(made_runs):
    out = made_runs[0]/'analysis'
    task = next(out.glob('made-up-P-raw-*'))
    for name in ('groups', 'win_loss', 'alpha', 'validation'):
        assert (task/f'{name}.svg').read_text().lstrip().startswith('<?xml')
        assert (task/f'{name}.pdf').read_bytes().startswith(b'%PDF')
    text = (out/'analysis.md').read_text()
    links = [l.split('](')[1][:-1] for l in text.splitlines() if l.startswith('![')]
    assert len(links) == 4 + 2 and all((out/l).exists() for l in links)
    assert not list((out/next(out.glob('other*'))).glob('win_loss*'))

def test_latex_is_balanced_and_escaped(made_runs):
    tex = next((made_runs[0]/'analysis').glob('made-up*/tables.tex')).read_text()
    assert tex.count(r'\begin{') == tex.count(r'\end{') > 10 and tex.count(r'\toprule') == tex.count(r'\bottomrule')
    assert r'hybrid\_learnable' in tex and 'hybrid_learnable' not in tex and 'α' not in tex and '≤' not in tex
    rows = [l for l in tex.splitlines() if l.endswith(r'\\')]
    assert rows and not any('%' in l.replace(r'\%', '') for l in rows)
    assert table(['a_b', 'x'], [['1 & 2', '-3 %']], 'latex').splitlines()[-3] == r'1 \& 2 & $-$3 \% \\'
    with pytest.raises(ValueError, match='text, md or latex'): table(['a'], [['b']], 'html')

def test_csv_files_have_the_columns_of_the_requirement(made_runs):
    out = made_runs[0]/'analysis'
    whole = pd.read_csv(out/'overall_comparison.csv')
    wanted = ['Model', *(f'{m}@{k}' for m in ('HR', 'NDCG', 'MRR') for k in (5, 10, 20)), 'Best Epoch', 'Best Val NDCG@10']
    assert [c for c in whole.columns if c in wanted] == wanted
    assert set(whole.Model) == {'sasrec', 'hybrid_learnable', 'markov'} and whole.Seeds.tolist().count(2) == 2
    assert np.isclose(whole.set_index('Model').loc['sasrec', 'Best Val NDCG@10'], .055)
    for g in ('short', 'medium', 'long'):
        part = pd.read_csv(out/f'comparison_{g}.csv')
        assert {'Model', 'HR@10', 'NDCG@10', 'MRR@10'} <= set(part.columns) and len(part) == 3

def test_figures_are_the_same_every_time(made_runs, tmp_path):
    s = sections(find_runs(made_runs[0]))[0]
    first, second = ([p.read_bytes() for p in save_figures(s, tmp_path)] for _ in range(2))
    assert first == second and len(first) == 8

def test_alpha_is_read_from_the_checkpoint(made_runs):
    s = sections(find_runs(made_runs[0]))[0]
    start, end = fusions(next(r for r in s.rows if r.model == 'hybrid_learnable').runs[0])
    assert all(abs(p.data - q.data - .5).max() < 1e-6 for p, q in zip(end.parameters(), start.parameters()))
    assert fusions(s.base.runs[0]) is None

def test_metrics_json_has_the_schema(made_runs):
    "hybrid.md 1.10, with alpha_stats; no NaN or Infinity"
    def refuse(x): raise AssertionError(f'{x} is not JSON')
    for path in made_runs[0].rglob('metrics.json'):
        m = json.loads(path.read_text(), parse_constant=refuse)
        assert {f'{k}@{n}' for k in ('HR', 'NDCG', 'MRR') for n in (5, 10, 20)} <= set(m['test_metrics'])
        assert {'short', 'medium', 'long', 'overall'} <= set(m['grouped_metrics'])
        assert all({'HR@10', 'NDCG@10', 'MRR@10', 'HR@20', 'count'} <= set(g) for g in m['grouped_metrics'].values())
        assert {'best_epoch', 'best_val_metric'} <= set(m)
        for g, a in m.get('alpha_stats', {}).items():
            assert set(a) == {'mean', 'std', 'min', 'max', 'count'} and a['count'] == m['grouped_metrics'][g]['count']
            assert a['mean'] is None or 0 <= a['min'] <= a['mean'] <= a['max'] <= 1

# ---- what folders are really like ----

def test_runs_that_lack_something(runs):
    rewrite(runs/'sasrec', drop=('best_val_metric', 'monitor', 'best_epoch'))
    (runs/'deep/er/x/ranks.npz').write_bytes(b'torn')
    (runs/'hybrid_learnable_20260217_095648/history.jsonl').unlink()
    (runs/'hybrid_learnable_20260217_095648/best/model.safetensors').write_bytes(b'torn')
    (runs/'other/metrics.json').write_text('{"test_metr')
    text = analyze(runs)
    assert 'hybrid_learnable is not compared user by user' in text
    assert '(no interval)' in text and 'metrics.json cannot be read' in text and 'other, protocol' not in text

def test_runs_without_groups(runs):
    for r in runs.rglob('metrics.json'): rewrite(r.parent, drop=('grouped_metrics', 'alpha_stats'))
    assert 'All users' in analyze(runs, save_csv=True)
    assert not list((runs/'analysis').glob('comparison_*'))

def test_other_tasks_stay_apart(runs):
    fake(runs/'sas', 0, 20, protocol='P-sas'); fake(runs/'cut', 0, 5, max_users=100)
    found = sections(find_runs(runs))
    assert len(found) == 4 and sorted(len(s.rows) for s in found) == [1, 1, 1, 2]
    assert any('the first 100 users' in s.title for s in found)
    assert len(set(map(task_folder, found))) == 4

def test_rows_differ_by_settings_not_by_name(runs):
    for a in (.3, .7): fake(runs/f'a{a}', 0, model='hybrid_fixed', fusion_type='fixed', fixed_alpha=a, name=f'run {a}')
    s = next(s for s in sections(find_runs(runs)) if len(s.rows) == 4)
    assert {r.name for r in s.rows} >= {'hybrid_fixed fixed_alpha=0.3', 'hybrid_fixed fixed_alpha=0.7'}

def test_a_copy_is_no_second_seed(runs):
    shutil.copytree(runs/'sasrec', runs/'sasrec again')
    s = next(s for s in sections(find_runs(runs)) if s.base)
    assert len(s.base.runs) == 2 and any('left out' in w for w in s.warnings)

def test_other_users_are_not_compared(runs):
    shutil.rmtree(runs/'deep'); shutil.rmtree(runs/'hybrid_learnable_20260217_095648')
    fake(runs/'odd', 0, n=100, model='gru4rec')
    s = next(s for s in sections(find_runs(runs)) if s.base)
    assert sum(bool(r.ranks) for r in s.rows) == 1 and any('not compared user by user' in w for w in s.warnings)
    assert tables(s)['overall'][2]

def test_different_budgets_are_named(runs):
    fake(runs/'long', 0, model='gru4rec', epochs=200)
    s = next(s for s in sections(find_runs(runs)) if s.base)
    assert 'budgets differ: at most 20, 200 epochs' in s.warnings

def test_base_of_another_name_and_none(runs):
    text = analyze(runs, base='hybrid_learnable')
    assert 'change against hybrid_learnable' in text
    out = runs/'analysis'
    assert list(out.rglob('win_loss.svg'))
    text = analyze(runs, base='nothing')
    assert text.count('no finished run of nothing') == 2 and 'change against' not in text
    assert not list(out.rglob('win_loss.svg'))          # that of the first time is gone

def test_nothing_to_analyze(tmp_path, runs):
    (tmp_path/'empty').mkdir()
    for root in (tmp_path/'empty', tmp_path/'nowhere'): assert analyze(root) == f'no runs in {root}: nothing to analyze'
    for p in list(runs.rglob('metrics.json')): p.unlink()
    text = analyze(runs)
    assert text.startswith('no finished runs in') and text.count('incomplete') == 6 and not (runs/'analysis').exists()

def test_many_models_are_all_in_the_tables(tmp_path):
    import warnings
    for k in range(11): fake(tmp_path/str(k), 0, k, n=60, model='sasrec' if k == 10 else 'hybrid_fixed', lr=k / 100,
                             **({} if k == 10 else dict(fusion_type='fixed', fixed_alpha=k / 10)))
    s, = sections(find_runs(tmp_path))
    assert len(overall(s)[2]) == 11
    with warnings.catch_warnings():
        warnings.simplefilter('error'); save_figures(s, tmp_path)
