"Tables of comparisons: what is one row, what is refused, what is flagged, and who may be called better."
import json
from pathlib import Path
import numpy as np, pytest
from seqrec_nb.analysis.significance import contrast, holm, mcnemar, per_seed
from seqrec_nb.compare import compare, comparison, differing, one_task, rows_of, verdict
from seqrec_nb.metrics import Ranks, averages, bootstrap

@pytest.fixture
def store(tmp_path):
    "Writes a finished run: settings, metrics, ranks"
    def write(model='sasrec', seed=0, lift=0., users=400, ranks=None, noise=.5, protocol='P-raw', fingerprint='a' * 64,
              stopped='finished', validation=.1, **settings):
        out = tmp_path/f'run{len(list(tmp_path.iterdir()))}'; out.mkdir()
        u = np.arange(users)
        if ranks is None:
            z = np.random.default_rng([seed, len(model)]).normal(np.random.default_rng(0).normal(4, 2, users) - lift, noise)
            ranks = Ranks(u, 0*u + 20, 0*u + 1, np.exp(z).clip(0, 900).astype(int), 0*u, 0*u + 1000)
        ranks.save(out/'ranks.npz')
        (out/'experiment.json').write_text(json.dumps(dict(model=model, seed=seed, protocol=protocol, **settings)))
        (out/'metrics.json').write_text(json.dumps(dict(
            model=model, seed=seed, protocol=protocol, fingerprint=fingerprint, stopped=stopped, test_metrics=averages(ranks),
            timings=dict(train_s=3., epochs=7), best_epoch=5, best_val_metric=validation)))
        return out
    return write

def five(store, model='sasrec', lift=0., seeds=range(5), **kw): return [store(model, s, lift, **kw) for s in seeds]

# rows

def test_runs_that_differ_in_the_seed_are_one_row(store):
    a, b = five(store, name='x', device='cpu'), five(store, 'bert', .2)
    a[2:3] = [store(seed=2, name='y', device='cuda', data='/elsewhere/ml-100k', threads=3)]
    rows = rows_of([b[3], *a[::-1], *b[:3]])
    assert list(rows) == ['bert', 'sasrec'] and rows == {'bert': [*b[:3], b[3]], 'sasrec': a}
    c = comparison([*a, *b])
    assert c['base'] == 'sasrec' and c['runs']['bert']['seeds'] == [0, 1, 2, 3, 4] and c['runs']['bert']['n'] == 400

def test_other_settings_are_other_rows_and_name_them(store):
    runs = [store(lr=.1), store(lr=.1, seed=1), store(lr=.2), store('bert')]
    assert {n: len(p) for n, p in rows_of(runs).items()} == {'sasrec lr=0.1': 2, 'sasrec lr=0.2': 1, 'bert': 1}
    assert list(rows_of(dict(mine=runs[0], yours=[*map(str, runs[:2])]))) == ['mine', 'yours']

def test_settings_of_an_older_version_have_their_defaults(store):
    assert len(rows_of([store(), store(seed=1, weight_decay=0., clip=None)])) == 1

def test_impossible_rows_are_refused(store):
    a, b, c = store(), store(seed=1, lr=.5, dropout=.3), store(seed=0)
    with pytest.raises(ValueError, match='runs of mine differ in more than the seed: .*lr'): rows_of(dict(mine=[a, b]))
    with pytest.raises(ValueError, match='seed 0 twice'): rows_of([a, c])
    with pytest.raises(ValueError, match='no runs'): compare([])
    with pytest.raises(FileNotFoundError, match='no finished run'): (a/'metrics.json').unlink(); compare([a])

def test_differing(store):
    rows = dict(a=[store(), store(seed=1)], b=store('bert', lr=.5, mask=.2), c=store('bert', lr=.5, mask=.3))
    d = differing(rows)
    assert d['seed'] == dict(a=[0, 1], b=0, c=0) and d['lr'] == dict(a=.001, b=.5, c=.5) and set(d) == {'model', 'seed', 'lr', 'mask'}
    assert d['mask'] == dict(b=.2, c=.3)                                     # a has no such setting

# what is refused

@pytest.mark.parametrize('change, reason', [(dict(protocol='P-seed'), 'P-seed'), (dict(fingerprint='b' * 64), 'b' * 12)])
def test_other_tasks_are_refused(store, change, reason):
    with pytest.raises(ValueError, match='cannot be compared.*' + reason): compare([store(), store('bert', **change)])
    with pytest.raises(ValueError, match='cannot be compared'): compare(dict(one=[store(), store(seed=1, **change)]))
    one_task(dict(a=dict(protocol='P', fingerprint='c' * 64)))

def test_other_users_are_refused_with_the_reason(store):
    with pytest.raises(ValueError, match='bert cannot be compared with sasrec: unpaired: 300 users and 400 users'):
        compare([store(), store('bert', users=300)])
    r = Ranks.load(store()/'ranks.npz'); r.target[:9] += 1
    with pytest.raises(ValueError, match='9 of 400 rows differ in target'): compare([store(), store('bert', ranks=r)])

def test_one_trained_row_has_no_settings_to_compare(store):
    m = store('markov', stopped='counted', validation=None)
    assert 'differ: none to compare, one row is trained' in compare([*five(store), m])
    assert 'differ: none.' in compare(five(store, 'gru')) and 'none' not in compare([store('a'), store('b'), m])

# numbers

def test_numbers_of_a_comparison(store):
    a, b, m = five(store), five(store, 'bert', .3), store('markov', lift=-.2, stopped='counted', validation=None)
    c = comparison(dict(base=a, better=b, markov=m))
    R = {n: [Ranks.load(p/'ranks.npz') for p in ps] for n, ps in (('base', a), ('better', b), ('markov', [m]))}
    x, row = per_seed(R['better'], 'NDCG@10'), c['runs']['better']
    l = row['levels']['NDCG@10']
    assert l['mean'] == pytest.approx(row['test_metrics']['NDCG@10']) and l['interval'] == bootstrap(x.mean(0))
    assert l['spread'] == pytest.approx(x.mean(1).std(ddof=1))
    for n in ('better', 'markov'):
        for metric, got in c['runs'][n]['minus_base'].items():
            want = contrast(R[n], R['base'], metric); assert {k: got[k] for k in want} == want
    every = [(n, k) for n in ('better', 'markov') for k in ('NDCG@10', 'HR@10')]
    p = [c['runs'][n]['minus_base'][k]['p'] for n, k in every]
    assert [c['runs'][n]['minus_base'][k]['holm'] for n, k in every] == holm(p)
    assert row['minus_base']['HR@10']['p'] == mcnemar(*(per_seed(R[n], 'HR@10') for n in ('better', 'base')))['p']
    assert c['runs']['base']['minus_base'] is None and c['runs']['base']['verdict'] is None

@pytest.mark.parametrize('metric', ['NDCG@10', 'HR@10', 'MRR@20'])
@pytest.mark.parametrize('fmt', ['text', 'md', 'latex'])
def test_a_comparison_can_be_kept_without_ranks(store, metric, fmt):
    runs = [*five(store), *five(store, 'bert', .2), store('markov', stopped='counted', validation=None)]
    c = comparison(runs, metric); kept = json.loads(json.dumps(c, allow_nan=False))
    assert kept == c and compare(kept, fmt=fmt) == compare(runs, metric, fmt) and 'None' not in compare(c, fmt=fmt)

# verdicts

def verdicts(runs, **kw): return {n: r['verdict'] for n, r in comparison(runs, **kw)['runs'].items()}

def test_better_and_worse_are_earned(store):
    base, alike = five(store), five(store, 'alike')
    v = verdicts(dict(base=base, up=five(store, 'bert', .5), down=five(store, 'caser', -.5), alike=alike))
    assert v == dict(base=None, up='better', down='worse', alike='not resolved')

@pytest.mark.parametrize('n', [1, 2, 4])
def test_few_seeds_resolve_nothing(store, n):
    base, few = five(store), five(store, 'bert', .9, seeds=range(n))
    why = f"{n} seed{'s' * (n > 1)} < 5"
    assert verdicts([*base, *few])['bert'] == f'not resolved ({why}; {n} against 5 seeds)'
    assert verdicts([*base[:n], *few])['bert'] == f'not resolved ({why})'

def test_more_seeds_on_one_side_resolve_nothing(store):
    assert verdicts([*five(store), *five(store, 'bert', .9, range(6))])['bert'] == 'not resolved (6 against 5 seeds)'

@pytest.mark.parametrize('change, why', [
    (dict(epochs=9), 'budget'), (dict(patience=3), 'budget'), (dict(batch_size=32), 'budget'), (dict(pretrain=10), 'budget'),
    (dict(loss='bpr'), 'loss'), (dict(loss='bpr', negatives=4), 'loss'), (dict(hard=100), 'loss')])
def test_another_loss_or_budget_is_flagged_and_resolves_nothing(store, change, why):
    base = five(store, **{'pretrain': 0, 'hard': 0})
    runs = [*base, *five(store, 'bert', .9, **{'pretrain': 0, 'hard': 0, **change})]
    c, question = comparison(runs), comparison(runs, meant=list(change))
    assert c['runs']['bert']['verdict'] == f'not resolved (other {why})' and question['runs']['bert']['verdict'] == 'better'
    for fmt, sign in (('text', '! '), ('md', '**Warning: '), ('latex', r'\textbf{Warning: ')):
        assert compare(c, fmt=fmt).startswith(sign + f'{why} differs: ') and sign not in compare(question, fmt=fmt)

def test_a_counted_model_needs_no_seeds(store):
    runs = [*five(store, batch_size=32, epochs=9), store('markov', lift=-.9, stopped='counted', validation=None)]
    assert verdicts(runs)['markov'] == 'worse' and '! ' not in compare(runs) and 'epochs:' not in compare(runs)
    assert verdicts(runs[::-1])['sasrec'] == 'better'
    assert verdicts([*runs[:2], runs[-1]])['markov'] == 'not resolved (2 seeds < 5)'

def test_seeds_that_disagree(store):
    lifts = (.9, -.2, -.2, 1., -.2)
    runs = [*five(store), *(store('moody', s, lift) for s, lift in enumerate(lifts))]
    c = comparison(runs)['runs']['moody']
    assert c['minus_base']['NDCG@10']['interval'][0] > 0 and c['minus_base']['NDCG@10']['holm'] < .001
    assert c['verdict'] == 'not resolved (seeds disagree)'

def test_a_model_against_itself(store):
    runs = five(store); c = comparison(dict(base=runs, same=runs))['runs']['same']
    assert c['verdict'] == 'not resolved' and {x[k] for x in c['minus_base'].values() for k in ('p', 'holm')} == {1.}

def test_the_correction_counts():
    d = dict(interval=[.001, .01], holm=.06, over_seeds=dict(interval=[.001, .01]))
    assert verdict(d) == 'not resolved' and verdict({**d, 'holm': .04}) == 'better'
    assert verdict({**d, 'holm': .04}, ['other loss']) == 'not resolved (other loss)'
    assert verdict({**d, 'holm': .04, 'interval': [-.01, -.001]}) == 'not resolved (seeds disagree)'
    assert verdict({**d, 'interval': None, 'holm': 1.}) == 'not resolved'

# how it looks

def test_detectable_comes_before_every_table(store):
    runs = [*five(store, epochs=3), *five(store, 'bert', epochs=4)]
    for fmt, head in (('text', 'run '), ('md', '| run'), ('latex', r'\begin{tabular}')):
        text = compare(runs, fmt=fmt)
        assert text.index('differs') < text.index('Minimum detectable difference') < text.index(head)
        d = comparison(runs)['runs']['bert']['minus_base']['NDCG@10']['detectable']
        assert f'{d:.4f}' in text[:text.index(head)]

def test_red_only_on_a_terminal(store, monkeypatch):
    runs = [store(), store('bert', epochs=3)]
    red = '\x1b[31m! budget differs'
    assert '\x1b' not in compare(runs) and red in compare(runs, color=True) and '\x1b' not in compare(runs, fmt='md', color=True)
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    assert red in compare(runs)
    monkeypatch.setenv('NO_COLOR', '1'); assert '\x1b' not in compare(runs)

def test_tables(store):
    runs = [*five(store, validation=.1), *five(store, 'bert', .4, validation=.2), *five(store, 'caser', validation=.3)]
    text = compare(runs)
    first = [l.split()[0] for l in text.splitlines() if l[:1].isalpha()]
    assert first.index('sasrec') < first.index('caser') < first.index('bert') and text.count('\ncaser ') == 2
    assert 'corrected for 4 tests' in text and 'model: sasrec (sasrec), bert (bert)' in text
    md = [l for l in compare(runs, fmt='md').splitlines() if l.startswith('| ')]
    assert len(md) == 4 + 3 and {l.count('|') for l in md[:4]} == {13} and {l.count('|') for l in md[4:]} == {12}
    assert compare([runs[0]]).count('\n\n') == 1 and 'Minimum' not in compare([runs[0]])
    assert r'\_' in compare(dict(a_b=runs[0]), fmt='latex')
