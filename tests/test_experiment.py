"Experiments: where a setting comes from, what a run leaves behind, and that its numbers are of the best epoch."
import dataclasses, json, math, shutil
import numpy as np, pandas as pd, pytest, torch
from seqrec_nb.checkpoint import CheckpointError
from seqrec_nb.experiment import (Experiment, Interrupted, PRESETS, RECIPES, build, evaluate_run, get_data, load_run,
                                  read_metrics, run, run_name)
from seqrec_nb.files import sha256
from seqrec_nb.metrics import Ranks, summary
from seqrec_nb.train import Callback

TINY = dict(d_model=8, n_blocks=1, n_heads=1, max_len=10, batch_size=16, lr=1e-2, dropout=.1, epochs=3, patience=0, threads=1)

@pytest.fixture(scope='module')
def csv(tmp_path_factory):
    "Walks around a ring with a few leaps"
    rng = np.random.default_rng(0); n = rng.integers(3, 25, 60)
    items = np.concatenate([(rng.integers(30) + rng.choice([1, 1, 1, 2, 7], k).cumsum()) % 30 for k in n])
    path = tmp_path_factory.mktemp('data')/'ring.csv'
    pd.DataFrame(dict(user=np.repeat(np.arange(60), n), item=items, timestamp=np.arange(n.sum()) + 10**9)).to_csv(path, index=False)
    return path

@pytest.fixture(scope='module')
def made(csv, tmp_path_factory):
    "A finished run"
    return run(Experiment(data=csv, **TINY), tmp_path_factory.mktemp('made')/'run')

@pytest.fixture
def own(made, tmp_path): return shutil.copytree(made, tmp_path/'own')

def results(out):
    "What must be equal in equal runs: everything but clocks and the machine"
    m = read_metrics(out)
    for k in ('timings', 'environment', 'commit'): del m[k]
    del m['checkpoint']['mtime']
    return m, (out/'best/model.safetensors').read_bytes(), (out/'last/model.safetensors').read_bytes(), history(out)

def history(out):
    rows = [json.loads(line) for line in (out/'history.jsonl').read_text().splitlines()]
    return [{k: r[k] for k in ('epoch', 'step', 'loss', 'targets', 'valid')} for r in rows]

# one record

def test_settings_have_an_order_of_precedence(monkeypatch):
    monkeypatch.setitem(RECIPES, ('sasrec', 'ml-100k'), dict(dropout=.5, epochs=120, batch_size=32, lr=5e-3))
    e = Experiment(preset='paper', batch_size=7)
    assert (e.args['dropout'], e.epochs, e.batch_size, e.lr, e.seed) == (.5, 200, 7, 1e-3, 0)
    assert [e.source[k] for k in ('dropout', 'epochs', 'batch_size', 'lr', 'seed')] == ['recipe', 'preset', 'given', 'preset', 'default']
    assert Experiment(data='ml-1m').source['lr'] == 'default' and Experiment(model='markov').epochs == 200
    assert Experiment(model='SASRec').model == 'sasrec'

def test_presets():
    assert {k: (PRESETS[k]['epochs'], PRESETS[k]['patience']) for k in PRESETS} == dict(test=(2, 0), quick=(50, 10), paper=(200, 20))
    e = Experiment(preset='paper'); assert (e.batch_size, e.lr) == (256, 1e-3)
    assert Experiment(preset='test').max_users == 1000

@pytest.mark.parametrize('given', [{}, dict(preset='test'), dict(preset='test', max_users=None), dict(d_model=8, seed=3, clip=1.), dict(model='markov', data='x.csv')], ids=str)
def test_round_trip(given):
    e = Experiment(**given); d = e.to_dict()
    assert 'args' not in d and json.loads(json.dumps(d, allow_nan=False)) == d
    assert Experiment(**d).to_dict() == d and Experiment(**d) == e

@pytest.mark.parametrize('given, error, message', [
    (dict(epoch=3), TypeError, "did you mean 'epochs'"), (dict(n_head=3), TypeError, "did you mean 'n_heads'"), (dict(model='sasrek'), ValueError, "did you mean 'sasrec'"),
    (dict(preset='papr'), ValueError, "did you mean 'paper'"), (dict(protocol='P-sass'), ValueError, "did you mean 'P-sas'"), (dict(model='markov', d_model=3), TypeError, 'd_model')], ids=str)
def test_unknown_names(given, error, message):
    with pytest.raises(error, match=message): Experiment(**given)

def test_arguments_of_the_model_may_come_as_args():
    "`args` is a field, so `Experiment(args=…)` and `dataclasses.replace` must understand it"
    e = Experiment(args=dict(d_model=8))
    assert e.args['d_model'] == 8 and e.source['d_model'] == 'given' and e == Experiment(d_model=8)
    assert dataclasses.replace(e, seed=4) == Experiment(d_model=8, seed=4)

def test_names_of_runs_are_of_their_settings():
    names = [run_name(Experiment(**kw)) for kw in (dict(), dict(seed=1), dict(d_model=8), dict(epochs=3), dict(protocol='P-sas'), dict(model='markov'))]
    assert len(set(names)) == 6 and run_name(Experiment(threads=1, device='cpu')) == names[0] and names[0].startswith('sasrec-ml-100k-P-raw-s0-')

# what a run leaves

def test_files(made):
    want = {'experiment.json', 'run.log', 'history.jsonl', 'metrics.json', 'ranks.npz', 'MANIFEST.json', 'best', 'last'}
    assert want <= {p.name for p in made.iterdir()}
    for kind in ('best', 'last'): assert {'model.safetensors', 'state.json', 'MANIFEST.json'} <= {p.name for p in (made/kind).iterdir()}
    assert (made/'last/optim.safetensors').exists() and not list(made.rglob('*.pt')) + list(made.rglob('*.pkl'))
    assert [r['epoch'] for r in history(made)] == [1, 2, 3] and 'NDCG@10' in history(made)[0]['valid']
    assert all(r['memory_mb'] > 0 for r in map(json.loads, (made/'history.jsonl').read_text().splitlines()))

SCHEMA = dict(test_metrics=dict, test_metrics_unmasked=dict, grouped_metrics=dict, best_epoch=int, best_val_metric=float, valid_metrics=dict, monitor=str,
              baselines=dict, paired=dict, model=str, data=str, protocol=str, name=str, seed=int, fingerprint=str, n_users=int, n_items=int,
              n_interactions=int, environment=dict, parameters=int, timings=dict, checkpoint=dict, stopped=str, recommendations=list, warnings=list)

def numbers(x):
    "All numbers of nested JSON"
    if isinstance(x, dict): x = list(x.values())
    return [n for v in x for n in numbers(v)] if isinstance(x, list) else [x] if isinstance(x, float) else []

def test_schema_of_metrics(made):
    refuse = lambda name: pytest.fail(f'{name} in metrics.json')
    m = json.loads((made/'metrics.json').read_text(), parse_constant=refuse)
    assert all(map(math.isfinite, numbers(m))) and 'commit' in m
    for k, kind in SCHEMA.items(): assert isinstance(m[k], kind), k
    names = {f'{a}@{k}' for a in ('HR', 'NDCG', 'MRR') for k in (5, 10, 20)}
    assert set(m['test_metrics']) == set(m['test_metrics_unmasked']) == set(m['valid_metrics']) == names
    assert set(m['grouped_metrics']) == {'short', 'medium', 'long', 'overall'} and m['grouped_metrics']['long']['count'] == 0
    assert m['grouped_metrics']['overall']['count'] == 60 == m['n_users'] and m['grouped_metrics']['overall']['HR@10'] == m['test_metrics']['HR@10']
    assert m['grouped_metrics']['long']['HR@10'] is None
    assert m['order'] == 'user-time-row' and m['cold']['policy'] == 'kept' and m['alone']['count'] == 0
    assert set(m['baselines']) == set(m['paired']) == {'popularity', 'markov', 'cooccurrence'}
    for b in m['baselines'].values(): assert {'test_metrics', 'grouped_metrics'} <= set(b)
    for p in m['paired'].values():
        assert set(p) == {'HR@10', 'NDCG@10'} and p['HR@10']['n'] == 60
        low, high = p['HR@10']['interval']; assert low <= p['HR@10']['difference'] <= high
    assert {'train_s', 'test_s', 'epochs'} <= set(m['timings']) and m['timings']['epochs'] == 3
    assert {'path', 'mtime', 'size', 'sha256', 'epoch', 'device'} <= set(m['checkpoint']) and m['checkpoint']['epoch'] == m['best_epoch']
    assert (m['model'], m['data'], m['protocol'], m['seed'], m['stopped']) == ('sasrec', 'ring', 'P-raw', 0, 'finished')

def test_numbers_belong_together(made):
    "Metrics are those of the ranks beside them, of the best epoch in the history, of the file that is named"
    m, r = read_metrics(made), Ranks.load(made/'ranks.npz')
    again = summary(r); h = history(made)
    assert again['test_metrics'] == m['test_metrics'] and len(r) == 60
    best = max(h, key=lambda x: x['valid']['NDCG@10'])
    assert m['best_epoch'] == best['epoch'] and m['best_val_metric'] == best['valid']['NDCG@10'] and m['valid_metrics'] == best['valid']
    file = made/m['checkpoint']['path']
    assert file.stat().st_size == m['checkpoint']['size'] and sha256(file) == m['checkpoint']['sha256']
    for b, p in m['paired'].items():
        assert math.isclose(p['HR@10']['difference'], m['test_metrics']['HR@10'] - m['baselines'][b]['test_metrics']['HR@10'], abs_tol=1e-9)
    log = (made/'run.log').read_text()
    assert all(str(m['checkpoint'][k]) in log for k in ('path', 'mtime', 'sha256')) and log.index(m['checkpoint']['sha256']) > log.index('epoch 3/3')
    e, data, model = load_run(made)
    assert m['parameters'] == sum(p.numel() for p in model.parameters()) and m['fingerprint'] == data.fingerprint

def test_evaluated_again(made):
    assert evaluate_run(made)['test_metrics'] == read_metrics(made)['test_metrics']
    assert evaluate_run(made, 'valid')['test_metrics'] == read_metrics(made)['valid_metrics']
    with pytest.raises(ValueError, match="did you mean 'valid'"): evaluate_run(made, 'vlaid')

def test_recommendations_are_unseen(made, csv):
    e, data, _ = load_run(made)
    rec, = read_metrics(made)['recommendations']
    frame = pd.read_csv(csv); users = frame.groupby('user').item.apply(lambda s: [str(i) for i in s])
    fits = [u for u in users if u[:-1][-5:] == rec['history'] and not set(u[:-1]) & set(rec['recommended'])]
    assert fits and len(set(rec['recommended'])) == 5

def test_the_record_reruns_to_the_same_bits(made, tmp_path):
    e = Experiment(**json.loads((made/'experiment.json').read_text()))
    again = run(e, tmp_path/'again')
    assert results(again) == results(made)

def test_another_seed_is_another_run(made, csv, tmp_path):
    other = run(Experiment(data=csv, **TINY, seed=1), tmp_path/'other')
    assert history(other)[0]['loss'] != history(made)[0]['loss']

def test_a_finished_run_is_left_alone(own, csv, capsys):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.rglob('*') if p.is_file() and p.name != '.lock'}
    run(Experiment(data=csv, **TINY), own); run(Experiment(data=csv, **TINY), own, 'must')
    assert 'finished' in capsys.readouterr().out
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in own.rglob('*') if p.is_file() and p.name != '.lock'}
    assert after == before

def test_started_afresh(own, made, csv):
    run(Experiment(data=csv, **{**TINY, 'd_model': 16}), own, 'never')
    assert load_run(own)[0].args['d_model'] == 16 and len(history(own)) == 3 and (own/'run.log').read_text().count('sha256') == 1
    run(Experiment(data=csv, **TINY), own, 'never')
    assert results(own) == results(made)

@pytest.mark.parametrize('change', [dict(d_model=16), dict(seed=1), dict(lr=2e-2), dict(protocol='P-sas'), dict(max_users=30), dict(loss='bce'), dict(model='markov')], ids=str)
def test_another_experiment_is_refused(change, own, csv):
    given = {**TINY, **change}
    if 'model' in change: given = dict(model='markov', max_len=10)        # it has no d_model
    before = {p.name: p.read_bytes() for p in own.iterdir() if p.is_file() and p.name != 'run.log'}
    key = 'd_model' if 'model' in change else next(iter(change))
    with pytest.raises(CheckpointError, match=f'another (experiment|run)(.|\n)*{key}: .* then, .* now'): run(Experiment(data=csv, **given), own)
    assert {p.name: p.read_bytes() for p in own.iterdir() if p.is_file() and p.name != 'run.log'} == before

def test_other_data_are_refused(own, csv, tmp_path):
    frame = pd.read_csv(csv); frame.loc[5, 'item'] = (frame.loc[5, 'item'] + 1) % 30
    frame.to_csv(tmp_path/'ring.csv', index=False)
    with pytest.raises(CheckpointError, match='fingerprint'): run(Experiment(data=tmp_path/'ring.csv', **TINY), own)

class StopAt(Callback):
    def __init__(self, step): self.at = step
    def on_step_end(self, t):
        if t.step == self.at: t.stop = 'enough'

@pytest.mark.parametrize('change', [dict(d_model=16), dict(model='markov')], ids=str)
def test_an_unfinished_run_is_not_overwritten(change, csv, tmp_path):
    "Its record and its checkpoints must still be there for the one who resumes it"
    out = tmp_path/'run'
    with pytest.raises(Interrupted): run(Experiment(data=csv, **TINY), out, callbacks=[StopAt(6)])
    files = lambda: {str(p.relative_to(out)): p.read_bytes() for p in out.rglob('*') if p.is_file() and p.name not in ('run.log', '.lock')}
    before = files()
    given = dict(model='markov', max_len=10) if 'model' in change else {**TINY, **change}
    with pytest.raises(CheckpointError): run(Experiment(data=csv, **given), out)
    assert files() == before

@pytest.mark.parametrize('steps', [(2,), (4, 5, 8)], ids=str)
def test_interrupted_and_resumed_is_the_same(steps, made, csv, tmp_path):
    out = tmp_path/'run'
    for at in steps:
        with pytest.raises(Interrupted, match='enough'): run(Experiment(data=csv, **TINY), out, callbacks=[StopAt(at)])
        assert not (out/'metrics.json').exists()
    run(Experiment(data=csv, **TINY), out, 'must')
    assert json.loads((out/'last/state.json').read_text())['trainer']['step'] == 12 and results(out) == results(made)

def test_more_epochs_continue(own, csv, tmp_path):
    longer = {**TINY, 'epochs': 5}
    starts = []
    class Start(Callback):
        def on_epoch_start(self, t): starts.append(t.epoch)
    run(Experiment(data=csv, **longer), own, callbacks=[Start()])
    whole = run(Experiment(data=csv, **longer), tmp_path/'whole')
    a, b = results(own), results(whole)
    assert starts == [3, 4] and a[1:] == b[1:] and a[0] == b[0] and read_metrics(own)['timings']['epochs'] == 5

def test_fewer_epochs_than_were_done(own, csv):
    "A record of 1 epoch must not stand beside results of the third"
    assert read_metrics(own)['best_epoch'] > 1
    try: run(Experiment(data=csv, **{**TINY, 'epochs': 1}), own)
    except CheckpointError: assert load_run(own)[0].epochs == 3
    else: assert read_metrics(own)['best_epoch'] <= load_run(own)[0].epochs

def test_must_resume_needs_something(csv, tmp_path):
    with pytest.raises(CheckpointError): run(Experiment(data=csv, **TINY), tmp_path/'run', 'must')

# the best epoch, not the last

class Damage(Callback):
    "Spoil the weights at the end of the last step of an epoch"
    def __init__(self, epoch): self.epoch = epoch
    def on_step_end(self, t):
        if t.epoch == self.epoch - 1 and t.step_in_epoch == t.loader.n_steps:
            with torch.no_grad(): t.model.item.weight.copy_(t.model.item.weight.roll(7, 0) * -1)

def test_the_test_is_of_the_best_epoch(made, csv, tmp_path):
    good = run(Experiment(data=csv, **TINY), tmp_path/'good')
    bad = run(Experiment(data=csv, **{**TINY, 'epochs': 4}), tmp_path/'bad', callbacks=[Damage(4)])
    a, b = read_metrics(good), read_metrics(bad)
    for k in ('test_metrics', 'test_metrics_unmasked', 'grouped_metrics', 'best_epoch', 'best_val_metric', 'recommendations', 'paired'): assert a[k] == b[k], k
    assert (good/'best/model.safetensors').read_bytes() == (bad/'best/model.safetensors').read_bytes() != (bad/'last/model.safetensors').read_bytes()
    assert history(bad)[-1]['valid']['NDCG@10'] < b['best_val_metric'] and b['best_epoch'] < 4
    assert evaluate_run(bad)['test_metrics'] == a['test_metrics']

def test_early_stopping_keeps_the_best(csv, tmp_path):
    out = run(Experiment(data=csv, **{**TINY, 'epochs': 30, 'patience': 2}), tmp_path/'run', callbacks=[Damage(4)])
    m = read_metrics(out)
    assert m['stopped'] == 'early stopping' and len(history(out)) == m['best_epoch'] + 2
    assert json.loads((out/'best/state.json').read_text())['epoch'] == m['best_epoch']

@pytest.mark.parametrize('how', ['flip', 'cut', 'gone'])
def test_a_damaged_best_is_refused(how, own):
    "Also where an older best lies beside it: that one is not what metrics.json speaks of"
    file = own/'best/model.safetensors'; data = bytearray(file.read_bytes())
    if how == 'flip': data[-5] ^= 4; file.write_bytes(data)
    if how == 'cut': file.write_bytes(data[:-8])
    if how == 'gone': file.unlink()
    with pytest.raises(CheckpointError, match='best'): load_run(own)
    with pytest.raises(CheckpointError, match='best'): evaluate_run(own)

def test_a_damaged_best_is_never_tested(csv, tmp_path):
    class Flip(Callback):
        def on_fit_end(self, t):
            file = tmp_path/'run/best/model.safetensors'; data = bytearray(file.read_bytes()); data[-5] ^= 4; file.write_bytes(data)
    with pytest.raises(CheckpointError, match='best'): run(Experiment(data=csv, **TINY), tmp_path/'run', callbacks=[Flip()])
    assert not (tmp_path/'run/metrics.json').exists() and 'failed: ' in (tmp_path/'run/run.log').read_text()

# other kinds of runs

@pytest.mark.parametrize('model', ['popularity', 'markov', 'cooccurrence'])
def test_baselines_are_runs(model, csv, made, tmp_path):
    out = run(Experiment(model=model, data=csv, max_len=10), tmp_path/'run')
    m = read_metrics(out)
    assert m['stopped'] == 'counted' and m['best_epoch'] == 0 and m['best_val_metric'] is None and model not in m['baselines']
    assert m['test_metrics'] == read_metrics(made)['baselines'][model]['test_metrics'] == evaluate_run(out)['test_metrics']
    assert len(m['baselines']) == 2 and all(map(math.isfinite, numbers(m)))
    before = (out/'metrics.json').read_bytes(); run(Experiment(model=model, data=csv, max_len=10), out)
    assert (out/'metrics.json').read_bytes() == before

def test_some_users(csv, tmp_path):
    e = Experiment(data=csv, **TINY, max_users=20); d, whole = get_data(e), get_data(Experiment(data=csv))
    assert len(d.train) == len(d.valid) == len(d.test) == 20 and d.test.user.max() == 19 and d.fingerprint == whole.fingerprint
    out = run(e, tmp_path/'run')
    assert read_metrics(out)['grouped_metrics']['overall']['count'] == 20 == len(Ranks.load(out/'ranks.npz'))
    assert len(get_data(Experiment(data=csv, max_users=10**6)).test) == 60

@pytest.mark.parametrize('kw', [dict(loss='bce', negatives=3), dict(samples='prefix'), dict(window='random'), dict(window='every', precision='bf16'), dict(clip=1., weight_decay=.1)], ids=str)
def test_other_settings_run(kw, csv, tmp_path):
    out = run(Experiment(data=csv, **{**TINY, 'epochs': 1}, **kw), tmp_path/'run')
    assert read_metrics(out)['identity'][next(iter(kw))] == next(iter(kw.values()))

def test_weights_are_a_function_of_the_seed(csv):
    d = get_data(Experiment(data=csv)); make = lambda s: build(Experiment(data=csv, **TINY, seed=s), d).state_dict()
    a, _, b, c = make(0), torch.rand(3), make(0), make(1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a['item.weight'], c['item.weight'])

@pytest.mark.parametrize('kind', [int, np.int64])
def test_a_seed_of_numpy_reruns_from_its_record(kind, csv, tmp_path):
    one = run(Experiment(data=csv, **TINY, seed=kind(1)), tmp_path/'one')
    two = run(Experiment(**json.loads((one/'experiment.json').read_text())), tmp_path/'two')
    assert history(one) == history(two)

@pytest.mark.parametrize('kw, message', [(dict(monitor='NDCG@11'), 'NDCG@10'), (dict(loss='cee'), "did you mean 'ce'"), (dict(device='gpu'), 'device'),
                                         (dict(negatives=3), 'no negatives'), (dict(window='first'), 'window')], ids=str)
def test_wrong_values_stop_the_run(kw, message, csv, tmp_path):
    with pytest.raises((ValueError, KeyError), match=message): run(Experiment(data=csv, **{**TINY, **kw}), tmp_path/'run')
    assert not (tmp_path/'run/metrics.json').exists() and not (tmp_path/'run/best').exists()
    run(Experiment(data=csv, **{**TINY, 'epochs': 1}), tmp_path/'run')            # and do not block the next try

def test_nobody_to_test_is_said(tmp_path):
    path = tmp_path/'short.csv'
    pd.DataFrame(dict(user=[1, 1, 2, 2], item=[1, 2, 2, 3], timestamp=np.arange(4) + 10**9)).to_csv(path, index=False)
    with pytest.raises(ValueError, match='(?i)three|test|valid'): run(Experiment(data=path, **TINY), tmp_path/'run')

def test_a_flip_anywhere_in_the_record_is_a_gap(own):
    "metrics.json, ranks.npz, experiment.json, history.jsonl and their manifest: `seqrec runs --check` finds any bit"
    import random
    from seqrec_nb import runs
    gap = lambda: [c.detail for c in runs.check_run(own) if c.ok is False]
    assert not gap()
    rng, names = random.Random(0), ('metrics.json', 'ranks.npz', 'experiment.json', 'history.jsonl', 'MANIFEST.json')
    alone = 0
    for name in names * 8:
        path = own/name
        good = path.read_bytes()
        bit = rng.randrange(8 * len(good))
        path.write_bytes(good[:bit // 8] + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1:])
        assert any(name in g or 'metrics.json' in g for g in gap()), name
        manifest = (own/'MANIFEST.json').rename(own/'gone')      # the twin: a record without its manifest
        alone += not gap()
        (own/'gone').rename(own/'MANIFEST.json')
        path.write_bytes(good)
    assert not gap() and alone > 8, 'without the manifest many flips are silent'

def test_a_run_that_will_not_fit_is_refused_unless_told(csv, tmp_path, monkeypatch):
    from seqrec_nb import training
    from seqrec_nb.memory import NotEnoughMemory
    monkeypatch.setattr(training, 'available_memory', lambda device='cpu': 1 << 20)
    small = dict(data=str(csv), d_model=8, epochs=1, max_len=10)
    with pytest.raises(NotEnoughMemory, match='too little'): run(Experiment(**small), tmp_path/'run')
    assert not (tmp_path/'run/last').exists()
    with pytest.warns(UserWarning, match='on_memory'): run(Experiment(**small, on_memory='warn'), tmp_path/'run')
    assert (tmp_path/'run/metrics.json').exists()

def test_a_time_limit_saves_and_stops(csv, tmp_path):
    small = dict(data=str(csv), d_model=8, epochs=3, max_len=10)
    with pytest.raises(Interrupted, match='time budget'): run(Experiment(**small, max_minutes=1e-9), tmp_path/'run')
    assert json.loads((tmp_path/'run/last/state.json').read_text())['trainer']['step'] == 1
    run(Experiment(**small), tmp_path/'run')
    assert (tmp_path/'run/metrics.json').exists()

@pytest.mark.parametrize('kw, message', [(dict(batch_size=0), 'batch_size is 0: at least 1'), (dict(clip=-1.), 'clip is -1.0: more than 0'), (dict(lr=float('nan')), 'finite'),
                                         (dict(precision='fp8'), 'precision'), (dict(d_model=0), 'd_model is 0'), (dict(max_minutes=0.), 'more than 0'),
                                         (dict(epochs=-1), 'epochs is -1'), (dict(monitor='foo'), 'metric'), (dict(hard=-1), 'hard is -1')], ids=str)
def test_values_that_cannot_be_right_are_refused_first(kw, message):
    with pytest.raises(ValueError, match=message): Experiment(**kw)

def test_a_model_that_cannot_be_made_for_lack_of_memory_is_named(csv, tmp_path, monkeypatch):
    from seqrec_nb.memory import NotEnoughMemory
    from seqrec_nb.models import SASRec
    def none_left(cls, data, make=None, **kw): raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(SASRec, 'from_data', classmethod(none_left))
    with pytest.raises(NotEnoughMemory, match='sasrec with .* cannot even be made'): run(Experiment(data=str(csv), d_model=8, epochs=1), tmp_path/'run')
