"Tables of experiments: what is refused, who wins, and that nothing is run twice. Trainings are tiny."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import ROOT
import seqrec_nb.models.hybrid
import seqrec_nb.workers as workers
from seqrec_nb.cells import kinds, literal, read_cell, read_seeds, typed
from seqrec_nb.commands import analyze, compare, grid
from seqrec_nb.compare import settings_of
from seqrec_nb.designs import TABLES
from seqrec_nb.files import RunLock
from seqrec_nb.flags import UsageError
from seqrec_nb.grid import TableError, budget, label, read_row, read_table
from seqrec_nb.jobs import Plan, count, key, is_done, open_jobs, state, winner
from seqrec_nb.models.base import lineage, model_class
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.models.window import AttentionRec
from seqrec_nb.outcome import meant, outcome, results
from seqrec_nb.workers import work

HEAD = 'name,model,data,epochs,patience,seeds,lr,d_model+n_heads,batch_size,max_len,n_blocks,threads\n'
TABLE = '# Is the wider one better?\n' + HEAD + '''\
base,sasrec,ring.csv,2,0,0-1,.01|.02,8/1,16,10,1,1
wide,sasrec,ring.csv,2,0,0-1,.01,8/1|16/2,16,10,1,1
pop,popularity,ring.csv,,,0,,,,,,
'''

def write_log(path, last=None):
    "Walks around a ring with a few leaps; `last` turns everybody's last item by so many places"
    rng = np.random.default_rng(0); n = rng.integers(4, 25, 60)
    items = np.concatenate([(rng.integers(30) + rng.choice([1, 1, 1, 2, 7], k).cumsum()) % 30 for k in n])
    if last: items[n.cumsum() - 1] = (items[n.cumsum() - 1] + last) % 30
    frame = dict(user=np.repeat(np.arange(60), n), item=items, timestamp=np.arange(n.sum()) + 10**9)
    pd.DataFrame(frame).to_csv(path, index=False)

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with a log and a table in it"
    monkeypatch.chdir(tmp_path)
    write_log('ring.csv'); Path('t.csv').write_text(TABLE)
    return tmp_path

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A finished grid, and what was printed"
    folder, came_from = tmp_path_factory.mktemp('grid'), os.getcwd()
    os.chdir(folder)
    try:
        write_log('ring.csv'); Path('t.csv').write_text(TABLE)
        assert grid(['t.csv']) == 0
    finally: os.chdir(came_from)
    return folder

@pytest.fixture
def there(made, monkeypatch): monkeypatch.chdir(made); return made

def bits(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('best/model.safetensors')}
def stamps(folder): return {p: p.stat().st_mtime_ns for p in Path(folder).rglob('*') if p.is_file() and p.parent != Path(folder)}
def one(**cells): return pd.DataFrame([dict(name='a', model='sasrec', data='ml-100k', epochs=2, **cells)])

# ---- cells ----

@pytest.mark.parametrize('cell, values', [('.0005|.001|.002', [.0005, .001, .002]), ('[.0005, .001, .002]', [.0005, .001, .002]), ([.1, .2], [.1, .2]),
                                          ('1', [1.]), (np.int64(1), [1.]), ('1e-3 | 2E-3', [.001, .002])], ids=str)
def test_a_cell_may_hold_a_list(cell, values):
    found = [c['lr'] for c in read_cell('lr', cell, kinds('sasrec'))]
    assert found == values and all(type(v) is float for v in found)

def test_values_have_the_type_of_their_setting():
    k = kinds('sasrec')
    assert typed('64', k['d_model']) == typed(64., k['d_model']) == 64 and type(typed('64.0', k['d_model'])) is int
    assert typed('true', k['scale_input']) is True and typed('none', k['d_inner']) is None and typed('2', k['negatives']) == 2
    assert typed('ce', k['loss']) == 'ce' and typed('16', {tuple}) == (16,) and typed('(2, 3)', {tuple}) == (2, 3)
    assert kinds('hybrid_fixed')['fixed_alpha'] == {float} and 'L_short' in kinds('hybrid_discrete')
    for bad, name in (('x', 'd_model'), ('2.5', 'epochs'), ('true', 'lr'), ('inf', 'lr'), ('1', 'scale_input')):
        with pytest.raises(ValueError): typed(bad, k[name])
    assert literal('3') == 3 and literal('P-raw') == 'P-raw'

def test_linked_columns_move_together():
    got = read_cell('d_model+n_heads+n_blocks', '32/2/1|64/2/2|128/4/3', kinds('sasrec'))
    assert got == [dict(zip(('d_model', 'n_heads', 'n_blocks'), v)) for v in ((32, 2, 1), (64, 2, 2), (128, 4, 3))]
    assert read_cell('L_short+L_long', '10/50|5/30', kinds('hybrid_discrete'))[1] == dict(L_short=5, L_long=30)
    assert read_cell('lr+batch_size', [[.1, 8]], kinds('sasrec')) == [dict(lr=.1, batch_size=8)]
    row = read_row({'name': 'a', 'model': 'sasrec', 'lr': '.1|.2', 'd_model+n_heads': '8/1|16/2'})
    assert [*row.candidates()] == [f'lr={lr},d_model={d},n_heads={h}' for lr in (.1, .2) for d, h in ((8, 1), (16, 2))]
    assert label(dict(x=(1, 2), y='a/b c')) == 'x=1-2,y=a-b-c'

@pytest.mark.parametrize('cell, seeds', [('0-4', [0, 1, 2, 3, 4]), ('0|1|2', [0, 1, 2]), ('3', [3]), ([0, 5], [0, 5]), (7, [7]), ('[1,2]', [1, 2]), (2., [2])], ids=str)
def test_seeds(cell, seeds): assert read_seeds(cell) == seeds

# ---- what is refused ----

@pytest.mark.parametrize('row, told', [
    ('a,sasrek,ring.csv,2,0,0,.01,8/1,16,10,1,1', "row 2 (a), column model: unknown model 'sasrek': did you mean 'sasrec'?"),
    ('a,sasrec,ring.csv,2,0,0,.0.1,8/1,16,10,1,1', "row 2 (a), column lr: '.0.1' is no number"),
    ('a,sasrec,ring.csv,two,0,0,.01,8/1,16,10,1,1', "row 2 (a), column epochs: 'two' is no whole number"),
    ('a,sasrec,ring.csv,2,0,0-,.01,8/1,16,10,1,1', 'row 2 (a), column seeds'),
    ('a,sasrec,ring.csv,2,0,1|1,.01,8/1,16,10,1,1', 'row 2 (a), column seeds'),
    ('a,sasrec,ring.csv,2,0,2.5,.01,8/1,16,10,1,1', "row 2 (a), column seeds: '2.5' is no whole number"),
    ('a,sasrec,no.csv,2,0,0,.01,8/1,16,10,1,1', 'row 2 (a), column data: no file no.csv'),
    ('a,sasrec,ring.csv,2,0,0,.01,8,16,10,1,1', "row 2 (a), column d_model+n_heads: '8' holds 1 value for the 2 settings d_model+n_heads: write one for each"),
    ('a,sasrec,ring.csv,2,0,0,.01,8/3,16,10,1,1', 'row 2 (a): ValueError: d_model (8) must be a multiple'),
    ('a,sasrec,ring.csv,2|3,0,0,.01,8/1,16,10,1,1', 'row 2 (a), column epochs: epochs must be the same'),
    ('a,markov,ring.csv,2,0,0,.01,8/1,16,10,1,1', "column d_model+n_heads: unknown setting 'd_model' for this model: it belongs to "),
    ('a,sasrec,ring.csv,2,0,0,.01|.01,8/1,16,10,1,1', 'column lr: a value stands there twice'),
    ('base,sasrec,ring.csv,2,0,0,.01,8/1,16,10,1,1', 'row 2 (base), column name: stands there twice'),
    ('a/b,sasrec,ring.csv,2,0,0,.01,8/1,16,10,1,1', "column name: 'a/b'"), (',sasrec,ring.csv,2,0,0,.01,8/1,16,10,1,1', 'column name: is empty'),
    ('a,sasrec,ring.csv,2,0,0,[.01,.02],8/1,16,10,1,1', 'needs quotation marks')])
def test_what_is_wrong_is_told_by_row_and_column(here, row, told, capsys):
    (here/'w.csv').write_text(HEAD + 'base,sasrec,ring.csv,2,0,0,.01,8/1,16,10,1,1\n' + row + '\n')
    with pytest.raises(UsageError) as e: grid(['w.csv'])
    assert told in str(e.value) and str(e.value).startswith('seqrec grid: w') and not (here/'runs').exists()

def test_unknown_columns_and_tables(here):
    with pytest.raises(TableError, match="column d_modl: unknown column 'd_modl': did you mean 'd_model'"): read_table(one(d_modl=3))
    with pytest.raises(TableError, match='column seed: unknown column'): read_table(one(seed=3))
    with pytest.raises(TableError, match="unknown table 'papr': did you mean 'paper'"): read_table('papr')
    with pytest.raises(TableError, match='no row'): read_table(one().iloc[:0])
    with pytest.raises(TableError, match='lr has a column already'): read_table(one(**{'lr': .1, 'lr+batch_size': '.1/3'}))
    for wrong in (dict(protocol='P-saz'), dict(preset='papr'), dict(loss='cee'), dict(monitor='NDGC@10'), dict(data='ml-10k')):
        with pytest.raises(TableError, match=f'row 1 .a., column {[*wrong][0]}: .*did you mean'): read_table(one().assign(**wrong))

def test_all_faults_are_told_at_once(here):
    frame = pd.concat([one(lr='x'), one(n_heads='y').assign(name='b')])
    with pytest.raises(TableError) as e: read_table(frame)
    assert len(str(e.value).splitlines()) == 2

def test_budgets_must_be_equal(here):
    two = pd.concat([one(lr='.1|.2'), one(lr='.1').assign(name='b')])
    with pytest.raises(TableError, match='budgets differ: epochs 2, patience 20, candidates 2: a; .*candidates 1: b'): read_table(two)
    assert 'budgets differ' in read_table(two, any_budget=True).warnings[0]
    (here/'free.csv').write_text('# Which?\n# --any-budget: not a comparison\n' + two.to_csv(index=False))
    t = read_table('free.csv')
    assert 'budgets differ' in t.warnings[0] and t.note.startswith('Which?')
    counted = pd.concat([one(lr='.1|.2'), pd.DataFrame([dict(name='p', model='popularity', data='ml-100k')])])
    assert read_table(counted).warnings == [], 'a model that is not trained has no budget'
    with pytest.raises(TableError, match='budgets differ'): read_table(pd.concat([one(), one(patience=3).assign(name='b')]))

def test_a_recipe_for_one_model_is_told():
    two = pd.concat([one(), one().assign(name='b', model='lightgcn')])
    told = read_table(two, {'patience': '5'}).warnings
    assert any(w.startswith('batch_size is not the same') and '(recipe)' in w for w in told)
    assert not any('batch_size' in w for w in read_table(two, dict(batch_size='64', patience='5')).warnings)

def test_changes_for_all_rows():
    two = pd.concat([one(), pd.DataFrame([dict(name='p', model='popularity', data='ml-100k')])])
    t = read_table(two, dict(epochs='7', dropout='.3', max_users='10'))
    assert t.rows[0].one().epochs == 7 and t.rows[0].one().args['dropout'] == .3 and t.rows[1].one().max_users == 10
    with pytest.raises(TableError, match='unknown column'): read_table(two, dict(epoch='7'))

@pytest.mark.parametrize('name', TABLES)
def test_built_in_tables(name):
    t = read_table(name)
    assert t.note and t.warnings == [] and {SASRec, AttentionRec} & {*lineage(model_class(t.rows[0].one().model))}
    assert all(r.fixed.get('loss') for r in t.rows)
    assert len({json.dumps(budget(r)) for r in t.rows}) == 1

# ---- a whole grid ----

def test_files_of_a_grid(made):
    out = made/'runs/t'
    assert {p.name for p in out.iterdir()} == {'base.candidates', 'base.candidates.json', 'base-s1', 'wide.candidates', 'wide.candidates.json', 'wide-s1',
                                               'pop-s0', 'results.json', 'results.md'}
    for row in ('base', 'wide'):
        c = json.loads((out/f'{row}.candidates.json').read_text())
        best = max(c['candidates'], key=lambda x: x['validation'])
        assert c['winner'] == best['label'] and len(c['candidates']) == 2 and c['seed'] == 0 and c['monitor'] == 'NDCG@10'
    # the first candidate of both rows is the same experiment: trained once
    assert len([*(out/'wide.candidates').iterdir()]) == 1 and len([*(out/'base.candidates').iterdir()]) == 2

def test_only_winners_are_tested(made):
    out = made/'runs/t'
    won = {json.loads((out/f'{r}.candidates.json').read_text())['winner'] for r in ('base', 'wide')}
    for run in [*out.glob('*.candidates/*')]:
        tested = {p.name for p in run.iterdir()} & {'metrics.json', 'ranks.npz'}
        known = run.name.removesuffix('-s0') in won or run.name == 'lr=0.01-s0' and 'd_model=8,n_heads=1' in won
        assert len(tested) == (2 if known else 0), run
        assert ('test with' in (run/'run.log').read_text()) == known

def test_results_hold_no_user(made):
    r = json.loads((made/'runs/t/results.json').read_text())
    task, = r['tasks']
    assert r['table'] == 't' and r['asks'] == 'Is the wider one better?' and len(task['fingerprint']) == 64 and task['protocol'] == 'P-raw'
    assert [*task['rows']] == ['base', 'wide', 'pop'] and task['rows']['base']['seeds'] == [0, 1] and task['comparison']['base'] == 'base'
    base = task['rows']['base']
    mean = np.mean([s['HR@10'] for s in base['by_seed']])
    assert base['test_metrics']['HR@10'] == pytest.approx(mean) and base['grouped_metrics']['overall']['count'] == 60 and 'commit' in r
    assert base['settings']['lr'] == float(base['winner'].removeprefix('lr=')) and base['budget'] == dict(epochs=2, patience=0, candidates=2)
    text = json.dumps(r)
    assert 'history' not in text and 'recommended' not in text and len(text) < 60_000
    def longest(x): return max([len(x)] * isinstance(x, list) + [longest(v) for v in (x.values() if isinstance(x, dict) else x)], default=0) if isinstance(x, (dict, list)) else 0
    assert longest(r) < 10, 'no list with a place for every user'

def test_nothing_is_run_twice(there, capsys):
    before = stamps('runs/t')
    assert grid(['t.csv']) == 0
    assert stamps('runs/t') == before
    told = capsys.readouterr().out
    assert '9 of 9 jobs are done' in told and 'minus base' in told and 'short' in told and 'results.json' in told and 'epoch 1/2' not in told
    plan = Plan(read_table('t.csv'), 'runs/t')
    assert open_jobs(plan) == [] and count(plan) == (9, 9)

def test_another_table_is_refused_the_folder(there):
    (there/'other.csv').write_text(TABLE.replace('16,10,1,1', '32,10,1,1'))
    with pytest.raises(UsageError, match='holds another experiment .batch_size: 16 then, 32 now'): grid(['other.csv', '--out', 'runs/t'])

def test_more_seeds_train_only_these(there, capsys):
    before = stamps('runs/t')
    assert grid(['t.csv', '--seeds', '0-2', '--only', 'wide']) == 0
    after = stamps('runs/t')
    assert {k: after[k] for k in before} == before and all('wide-s2' in str(p) for p in {*after} - {*before})

def test_other_seeds_do_not_choose_again(there):
    "`--seeds 3-4`: the candidates and the winner are those of the table's first seed"
    t, before = read_table('t.csv'), stamps('runs/t')
    own, other = Plan(t, 'runs/t'), Plan(t, 'runs/t', read_seeds('3-4'))
    kept = {p: p.read_bytes() for p in Path('runs/t').glob('*.candidates.json')}
    for a, b in zip(own.rows, other.rows):
        assert [j.out for j in own.candidates(a)] == [j.out for j in other.candidates(b)] and winner(own, a) == winner(other, b)
    todo = [j.out.name for j in open_jobs(other) if j.row != 'pop']
    assert todo == ['base-s3', 'base-s4', 'wide-s3', 'wide-s4']
    assert {p: p.read_bytes() for p in Path('runs/t').glob('*.candidates.json')} == kept and stamps('runs/t') == before

def test_another_loss_is_never_meant(here):
    for name in TABLES: assert not {'loss', 'negatives', 'hard', 'epochs', 'patience'} & {*meant(Plan(read_table(name), 'x'))}
    assert {'batch_size', 'pretrain'} <= {*meant(Plan(read_table('paper'), 'x')), *meant(Plan(read_table('tuning'), 'x'))}
    same = dict(model='sasrec', data='ring.csv', epochs=1, patience=0, max_len=10, d_model=8, n_heads=1, n_blocks=1, threads=1, seeds=0)
    rows = [dict(same, name=n, batch_size=b, loss=l) for n, b, l in (('a', 32, 'ce'), ('b', 32, 'bce'), ('c', 64, 'ce'))]
    plan = Plan(read_table(pd.DataFrame(rows)), 'out')
    assert work(plan) == {}
    got = {n: r['verdict'] for n, r in results(plan)['tasks'][0]['comparison']['runs'].items()}
    assert got == dict(a=None, b='not resolved (1 seed < 5; other loss)', c='not resolved (1 seed < 5)')
    assert '! loss differs: loss ce (a, c), bce (b)' in outcome(plan) and 'budget differs' not in outcome(plan)

def test_compare_and_analyze(there, capsys):
    assert compare(['runs/t/base-s1', 'runs/t/pop-s0', '--markdown']) == 0
    told = capsys.readouterr().out
    assert '| run |' in told and 'Settings that differ: none to compare, one row is trained' in told
    two = ['runs/t/base-s1', 'runs/t/pop-s0']
    assert compare([*two, '--meant', 'lr', '--meant', 'loss']) == 0 and 'minus' in capsys.readouterr().out
    with pytest.raises(UsageError, match="--meant: unknown setting 'batchsize': did you mean 'batch_size'"): compare([*two, '--meant', 'batchsize'])
    assert analyze(['runs/t', '--save-csv', '--out', str(there/'analysis')]) == 0
    assert (there/'analysis').is_dir()
    assert analyze(['runs/t', '--base', 'popularity', '--out', str(there/'other')]) == 0 and 'change against popularity' in capsys.readouterr().out

# ---- the winner is chosen on validation ----

def test_test_rows_have_no_say(made, tmp_path, monkeypatch):
    "With every test item replaced the candidates' values and the winner are the same to the last bit"
    monkeypatch.chdir(tmp_path)
    write_log('ring.csv', last=11); Path('t.csv').write_text(TABLE)
    plan = Plan(read_table('t.csv'), 'out')
    rows = [r for r in plan.rows if r.axes]
    todo = {j.out: j for r in rows for j in plan.candidates(r)}
    for job in todo.values(): assert workers.attempt(job) == ('done', '')
    for r in rows:
        assert winner(plan, r)
        assert (tmp_path/f'out/{r.name}.candidates.json').read_bytes() == (made/f'runs/t/{r.name}.candidates.json').read_bytes()

# ---- trouble ----

SHORT = HEAD + ''.join(f'{n},sasrec,ring.csv,1,0,0,{lr},8/1,16,10,1,1\n' for n, lr in (('a', .01), ('b', .02), ('c', .03)))

def test_a_failure_is_told_and_the_others_go_on(here, monkeypatch, capsys):
    (here/'s.csv').write_text(SHORT)
    real = workers.run
    def fails(e, *a, **kw):
        if e.lr == .02: raise RuntimeError('no such luck')
        return real(e, *a, **kw)
    monkeypatch.setattr(workers, 'run', fails)
    assert grid(['s.csv']) == 1
    told = capsys.readouterr()
    assert 'failed: b s0, in runs/s/b-s0: RuntimeError: no such luck' in told.err and '! not finished: b' in told.out
    assert (here/'runs/s/c-s0/metrics.json').exists()
    before = stamps('runs/s/a-s0') | stamps('runs/s/c-s0')
    monkeypatch.setattr(workers, 'run', real)
    assert grid(['s.csv']) == 0 and stamps('runs/s/a-s0') | stamps('runs/s/c-s0') == before

def test_a_locked_run_is_left_to_its_process(here, capsys):
    (here/'s.csv').write_text(SHORT)
    with RunLock('runs/s/b-s0'): assert grid(['s.csv']) == 75
    told = capsys.readouterr()
    assert 'locked: b s0' in told.err and (here/'runs/s/c-s0/metrics.json').exists() and not (here/'runs/s/b-s0/metrics.json').exists()

def test_ctrl_c_says_how_to_continue(here, monkeypatch, capsys):
    (here/'s.csv').write_text(SHORT)
    def stop(*a, **kw): raise workers.Interrupted('interrupted; everything is saved')
    monkeypatch.setattr(workers, 'run', stop)
    assert grid(['s.csv', '--only', 'a']) == 75
    assert 'continue with: seqrec grid s.csv --only a' in capsys.readouterr().err

LONG = TABLE.replace(',2,0,0-1,', ',12,0,0,')
CLI = 'import sys; from seqrec_nb.commands import grid\nif __name__ == "__main__": sys.exit(grid(sys.argv[1:]))'

def wait_for(test, seconds=300):
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.05)

@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_stopped_with_workers_and_continued(here, tmp_path_factory):
    "Two workers, SIGTERM in the middle: exit code 75, nobody left; continued in one process to the same bits"
    (here/'long.csv').write_text(LONG); (here/'cli.py').write_text(CLI)
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    p = subprocess.Popen([sys.executable, 'cli.py', 'long.csv', '--workers', '2'], cwd=here, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    histories = lambda: [h for h in (here/'runs/long').glob('*/*/history.jsonl') if h.stat().st_size]   # rglob meets checkpoints that are being renamed
    wait_for(lambda: len(histories()) >= 2 or p.poll() is not None)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 75 and 'continue with: seqrec grid long.csv --workers 2' in err and 'Traceback' not in err, err
    assert 'epoch 1/12' not in out
    plan = Plan(read_table('long.csv'), 'runs/long')
    assert all(state(j) != 'running' for r in plan.rows for j in plan.candidates(r)), 'a worker is left'
    done = {f: stamps(f) for f in Path('runs/long').glob('*-s*') if (f/'metrics.json').exists()}
    assert work(plan) == {} and open_jobs(plan) == []
    assert all(stamps(f) == s for f, s in done.items())
    whole = Plan(read_table('long.csv'), 'whole'); work(whole)
    assert bits('runs/long') == bits('whole') and len(bits('whole')) == 4

def test_a_worker_that_dies_costs_one_run(here, capsys):
    (here/'s.csv').write_text(SHORT)
    crew = workers.Crew(1)
    jobs = open_jobs(Plan(read_table('s.csv'), 'runs/s'))
    crew.give(jobs[0])
    (process, *_), = crew.busy.values()
    process.kill()
    (job, how, why, *_), = crew.take()
    assert job == jobs[0] and how == 'failed' and f'process {process.pid}) was killed by SIGKILL' in why and not crew.busy
    crew.stop()

# ---- the command ----

def test_dry_run_touches_nothing(here, capsys):
    assert grid(['t.csv', '--dry-run']) == 0
    told = capsys.readouterr().out
    assert '0 of 9 jobs are done, in runs/t' in told and 'candidates trained' in told and not (here/'runs').exists()
    assert grid(['t.csv', '--dry-run', '--only', 'pop']) == 0 and '0 of 1 jobs' in capsys.readouterr().out

def test_trying_out_has_a_folder_of_its_own(here, capsys):
    assert grid(['t.csv', '--set', 'epochs=1', '--set', 'max_users=20', '--seeds', '0', '--only', 'pop']) == 0
    assert (here/'runs/t+epochs=1+max_users=20/pop-s0/metrics.json').exists()

@pytest.mark.parametrize('line, told', [('t.csv --only bse', "unknown row 'bse': did you mean 'base'"), ('t.csv --set epochs', 'KEY=VALUE'),
    ('t.csv --set epoch=2', "did you mean 'epochs'"), ('t.csv --seeds 4-0', 'seeds'), ('t.csv --workers 0', '--workers 0'),
    ('t.csv --worker 2', "did you mean '--workers'"), ('papr', "did you mean 'paper'"), ('t.csv --set max_users=many', "'many' is no whole number")])
def test_what_cannot_be_understood(here, line, told):
    with pytest.raises(UsageError, match=told): grid(line.split())

def test_list_of_tables(capsys):
    assert grid(['--list']) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in TABLES)

def test_help_is_light():
    code = '''import sys
from seqrec_nb.commands import analyze, compare, grid
for f in (grid, compare, analyze):
    assert f.__doc__
    try: f(['--help'])
    except SystemExit as e: assert not e.code
assert not {'torch', 'numpy', 'pandas'} & {*sys.modules}, 'heavy'
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '--workers' in done.stdout and '--markdown' in done.stdout and '--save-csv' in done.stdout

def test_same_experiments_have_one_essence(here):
    t = read_table('t.csv')
    a, b = t.rows[0].experiment(0, dict(lr=.01)), t.rows[1].experiment(0, dict(d_model=8, n_heads=1))
    assert key(a) == key(b) and key(a) != key(t.rows[0].experiment(1, dict(lr=.01)))
    a.threads, a.name, a.save_every = 3, 'x', 1.
    assert key(a) == key(b)

def test_compare_and_grid_agree_on_what_an_experiment_is(there):
    "A run's settings as `compare` reads them are those that the grid looks for; the place of the data apart"
    plan = Plan(read_table('t.csv'), 'runs/t')
    for row in plan.rows:
        for job in plan.finals(row, winner(plan, row)):
            if (job.out/'experiment.json').exists(): assert settings_of(job.out) == {k: v for k, v in json.loads(key(job.e)).items() if k != 'data'}
