"The command: names, flags, files, exit codes. Trainings are tiny and run in this process."
import json, re, shlex, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from conftest import ROOT, needs_data
import seqrec_nb.experiment as experiment
from seqrec_nb.arguments import all_flags, merged, model_flags, settings_flags, train_arguments
from seqrec_nb.cli import COMMANDS, main, resume_line
from seqrec_nb.flags import dashed, make_flag, reader
from seqrec_nb.models.base import MODELS
from seqrec_nb.train import NonFinite

TINY = '--d-model 16 --n-blocks 1 --max-len 20 --batch-size 32 --lr 5e-3 --threads 1'.split()

@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder with a file of walks in it"
    rng = np.random.default_rng(0)
    n = rng.integers([5, 12, 52], [11, 30, 60], (20, 3)).ravel()
    items = np.concatenate([(rng.integers(40) + rng.integers(1, 12, k).cumsum()) % 40 for k in n])
    frame = {'user': np.repeat(np.arange(60), n), 'item': items, 'timestamp': np.arange(n.sum()) + 10**9}
    pd.DataFrame(frame).to_csv(tmp_path/'walks.csv', index=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def asked(line): return train_arguments(shlex.split(line))[0]
def settings(run): return json.loads((Path(run)/'experiment.json').read_text())

# ---- the command itself ----

def test_help_is_light_and_complete():
    "No torch, no NumPy, no pandas for --help and for a list of runs"
    code = '''import sys, seqrec_nb.cli as c
for argv in (['--help'], ['--version'], ['runs', 'nowhere']): assert c.main(argv) == 0
assert not {'torch', 'numpy', 'pandas', 'yaml'} & {*sys.modules}, 'heavy'
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ('train', 'grid', 'compare', 'analyze', 'data', 'evaluate', 'recommend', 'runs', 'doctor'))
    assert [*COMMANDS] == ['train', 'grid', 'compare', 'analyze', 'runs', 'evaluate', 'recommend', 'data', 'doctor']

@pytest.mark.parametrize('line', ['train --help', 'train markov --help', 'data --help', 'evaluate -h', 'runs -h', 'doctor -h', 'grid --help', 'compare -h', 'analyze -h', 'recommend -h'])
def test_every_command_has_help(line, capsys):
    assert main(line.split()) == 0
    assert line.split()[0] in capsys.readouterr().out

def test_help_of_a_model_lists_its_flags(capsys):
    main(['train', 'sasrec', 'ml-100k', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for f in model_flags('sasrec'): assert f"--{f.name.replace('_', '-')}" in text and (f.help[:15] in text)
    assert '--preset' in text and '--resume' in text and '[recipe]' in text       # a recipe for this model and data
    main(['train', 'markov', '--help'])
    assert '--n-heads' not in capsys.readouterr().out

@pytest.mark.parametrize('line, hint', [
    ('trian', "did you mean 'train'"), ('train sasrek', "did you mean 'sasrec'"), ('train --model sasrek', "did you mean 'sasrec'"),
    ('train sasrec ml-10k', "did you mean 'ml-100k'"), ('train --data no/such.csv', 'no file no/such.csv'),
    ('train --protocol P-saz', "did you mean 'P-sas'"), ('train --preset papr', "did you mean 'paper'"),
    ('train --droput .1', "did you mean '--dropout'"), ('train --batch_siz 3', "did you mean '--batch-size'"), ('train --epochs many', 'invalid int'),
    ('train markov --n_heads 4', 'belongs to sasrec'), ('train --drop .1', '--dropout'), ('train --resume maybe', "unknown way 'maybe'"),
    ('train a b c', 'too many'), ('train sasrec --model markov', 'which model'), ('train --config no.json', 'no.json'),
    ('data', 'required'), ('data ml-10k', 'ml-100k'), ('evaluate x --split tset', 'tset'), ('runs --chek x', "did you mean '--check'")])
def test_what_cannot_be_understood(line, hint, capsys):
    assert main(line.split()) == 2
    told = capsys.readouterr()
    assert hint in told.err and told.out == '' and 'Traceback' not in told.err and len(told.err.strip().splitlines()) == 1

def test_other_errors_are_one_line(here, capsys):
    assert main(['evaluate', 'nowhere']) == 1
    told = capsys.readouterr().err
    assert told.startswith('seqrec: FileNotFoundError: nowhere') and 'Traceback' not in told
    (here/'bad.csv').write_text('user,item,timestamp\n1,2,3\n1,2\n')
    assert main(['train', 'markov', 'bad.csv', '--debug']) == 1
    assert 'Traceback' in capsys.readouterr().err

# ---- flags ----

def test_every_setting_is_a_flag():
    from dataclasses import fields
    assert {f.name for f in settings_flags()} == {f.name for f in fields(experiment.Experiment)} - {'args'}
    assert set(all_flags()) == set(MODELS) and all(f.help for f in settings_flags())
    for name in MODELS:     # each with the value that it has anyway
        e = asked(f'{name} ml-1m ' + shlex.join(a for f in model_flags(name) if f.kind is not bool and f.default is not None
                                                for a in ('--' + f.name, str(f.default))))
        assert {f.name for f in model_flags(name)} <= set(e.to_dict())
        assert all(e.args[f.name] == f.default for f in model_flags(name) if f.default is not None)

def test_dashes_underscores_and_order_do_not_matter():
    lines = ['sasrec ml-1m --d-model 32 --batch-size 8 --scale-input', '--d_model 32 --batch_size=8 --scale_input sasrec ml-1m',
             '--d-model=32 sasrec --scale-input --batch_size 8 --data ml-1m', '--model SASRec --data_path ml-1m --d_model 32 --batch-size 8 --scale-input']
    made = [asked(line) for line in lines]
    assert all(e == made[0] for e in made) and made[0].args['d_model'] == 32 and made[0].args['scale_input'] is True
    assert asked('--no-scale-input').args['scale_input'] is False
    assert dashed(['--data_path=a_b.csv', 'a_b', '-x_y']) == ['--data-path=a_b.csv', 'a_b', '-x_y']

def test_types_of_values():
    e = asked('sasrec ml-1m --lr 1e-4 --d-inner 128 --clip none --negatives 7')
    assert (e.lr, e.args['d_inner'], e.clip, e.negatives) == (1e-4, 128, None, 7)
    assert asked('sasrec ml-1m --d-inner none').args['d_inner'] is None
    assert reader(make_flag('sizes', tuple, (3, 5)))('7,9') == (7, 9)
    assert reader(make_flag('x', float | None, None))('None') is None
    assert make_flag('x', int | float, 1).kind is float and make_flag('x', str | None, None).optional

def test_defaults_are_left_to_recipe_and_preset():
    assert asked('sasrec ml-100k').source['dropout'] == 'recipe'
    e = asked('sasrec ml-100k --preset quick --lr .1')
    assert (e.epochs, e.patience, e.lr) == (50, 10, .1) and e.source['epochs'] == 'preset'
    e = asked('sasrec ml-1m --preset paper')
    assert (e.epochs, e.patience, e.batch_size, e.lr) == (200, 20, 256, 1e-3)
    assert asked('sasrec ml-1m --preset test').max_users == 1000 and asked('sasrec ml-1m --preset test').epochs == 2

def test_names_of_runs_differ_as_the_runs_do():
    a, b, c = (asked(f'sasrec ml-1m --lr {x}') for x in ('.1', '.2', '.1'))
    assert a.name == c.name != b.name and a.name.startswith('sasrec-ml-1m-P-raw-s0-') and '/' not in a.name
    assert asked('--name mine').name == 'mine'

# ---- settings from files ----

def test_flags_win_over_a_file(here):
    (here/'c.yaml').write_text('model: sasrec\ndata: walks.csv\nlr: 1e-3\nd_model: 16\nepochs: 9\nscale-input: true\n')
    (here/'c.json').write_text(json.dumps(dict(model='sasrec', data='walks.csv', lr=1e-3, d_model=16, epochs=9, scale_input=True)))
    for file in ('c.yaml', 'c.json'):
        e = asked(f'--config {file}')
        assert (e.lr, e.args['d_model'], e.epochs, e.args['scale_input']) == (1e-3, 16, 9, True)
        e = asked(f'--config {file} --d_model 32 --lr .5')
        assert (e.lr, e.args['d_model'], e.epochs) == (.5, 32, 9)
        assert asked(f'--config {file} --preset quick').epochs == 50
        assert asked(f'--config {file} --preset quick --epochs 3').epochs == 3
    assert merged(dict(name='a', lr=1), {}, {})['name'] == 'a' and 'name' not in merged(dict(name='a', lr=1), dict(lr=2), {})

@pytest.mark.parametrize('text', ['lrr: 1', 'lr: fast', '- 1', 'model: sasrek'])
def test_files_with_wrong_settings(text, here, capsys):
    (here/'c.yaml').write_text(text)
    assert main(['train', '--config', 'c.yaml']) == 2 and capsys.readouterr().err.startswith('seqrec train: ')

def test_a_files_tags_make_no_objects(here, capsys):
    (here/'c.yaml').write_text('lr: !!python/object/apply:os.getcwd []')
    assert main(['train', '--config', 'c.yaml']) == 1

# ---- trainings ----

def test_train_list_examine_evaluate(here, capsys):
    assert main(['train', 'sasrec', 'walks.csv', '--epochs', '2', *TINY, '--out', 'runs/a']) == 0
    told = capsys.readouterr().out
    assert {'experiment.json', 'run.log', 'history.jsonl', 'metrics.json', 'ranks.npz', 'best', 'last'} <= {p.name for p in Path('runs/a').iterdir()}
    for what in ('HR@10', 'popularity', 'markov', 'cooccurrence', 'short (≤ 10)', '95 %', '5. '): assert what in told
    first = json.loads(Path('runs/a/metrics.json').read_text())

    # a run's settings make the same run again, to the last bit
    assert main(['train', '--config', 'runs/a/experiment.json', '--out', 'runs/b']) == 0
    assert json.loads(Path('runs/b/metrics.json').read_text())['test_metrics'] == first['test_metrics']
    assert {k: v for k, v in settings('runs/a').items() if k != 'name'} == {k: v for k, v in settings('runs/b').items() if k != 'name'}
    # with a flag, another one, in a directory of its own
    assert main(['train', '--config', 'runs/a/experiment.json', '--epochs', '1', '--save_dir', 'more']) == 0
    assert [settings(p)['epochs'] for p in Path('more').iterdir()] == [1]
    # the same command once more: nothing to do, the same report
    before = (here/'runs/a/metrics.json').stat().st_mtime_ns
    assert main(['train', 'sasrec', 'walks.csv', '--epochs', '2', *TINY, '--out', 'runs/a']) == 0
    assert (here/'runs/a/metrics.json').stat().st_mtime_ns == before
    # another experiment is refused this directory
    capsys.readouterr()
    assert main(['train', 'sasrec', 'walks.csv', '--epochs', '2', *TINY, '--lr', '.5', '--out', 'runs/a']) == 1
    assert 'lr: ' in capsys.readouterr().err

    assert main(['runs']) == 0 and capsys.readouterr().out.count('done') == 2
    assert main(['runs', '.', '--save-csv']) == 0 and capsys.readouterr().out.count('done') == 3
    assert len(pd.read_csv('overall_comparison.csv')) == 3
    assert main(['runs', '--check', 'runs/a']) == 0
    for split in ('test', 'valid'):
        capsys.readouterr()
        assert main(['evaluate', 'runs/a', '--split', split]) == 0
        told = capsys.readouterr().out
        expected = first['test_metrics' if split == 'test' else 'valid_metrics']['NDCG@10']
        assert f'{expected:.4f}' in told and '!' not in told
    (here/'runs/a/ranks.npz').unlink()
    assert main(['runs', '--check', 'runs/a']) == 1 and 'GAP' in capsys.readouterr().out

@pytest.mark.parametrize('model', ['popularity', 'markov', 'cooccurrence'])
def test_baselines_run_too(model, here, capsys):
    assert main(['train', model, 'walks.csv', '--out', 'run']) == 0 and main(['runs', '--check', 'run']) == 0
    assert 'counted, not trained' in capsys.readouterr().out

def test_preset_test_examines_its_run(here, capsys, monkeypatch):
    train = ['train', 'sasrec', 'walks.csv', '--preset', 'test', *TINY, '--out', 'run']
    assert main(train) == 0
    told = capsys.readouterr().out
    assert 'preset test: epochs 2' in told and re.search(r'ok +loss', told) and 'GAP' not in told and ' s an epoch' in told
    (here/'run/ranks.npz').unlink()
    assert main(train) == 1 and re.search(r'GAP +ranks', capsys.readouterr().out)

def test_interrupted_and_continued(here, capsys, monkeypatch):
    "SIGTERM in the second epoch: exit 75, and the printed command ends where the whole run would have"
    from seqrec_nb.callbacks import Progress
    train = ['train', 'sasrec', 'walks.csv', '--epochs=3', *TINY]
    assert main([*train, '--out', 'whole']) == 0
    shown = Progress.on_step_end
    def on_step_end(self, t):
        if t.epoch == 1 and t.step_in_epoch == 1: signal.raise_signal(signal.SIGTERM)
        shown(self, t)
    capsys.readouterr()
    with monkeypatch.context() as m:
        m.setattr(Progress, 'on_step_end', on_step_end)
        assert main([*train, '--save_dir', 'my runs']) == 75
    line = re.search(r'resume with: (seqrec train .*)', capsys.readouterr().err)[1]
    words = shlex.split(line)
    assert words[-4:-2] == ['--out', words[-3]] and words[-2:] == ['--resume', 'auto'] and '--save_dir' not in words
    out = Path(words[words.index('--out') + 1])
    assert out.parent.name == 'my runs' and not (out/'metrics.json').exists()
    main(['runs', 'my runs'])
    assert 'incomplete' in capsys.readouterr().out
    assert main(words[1:]) == 0
    same = [json.loads((d/'metrics.json').read_text())['checkpoint']['sha256'] for d in (Path('whole'), out)]
    assert same[0] == same[1]

def test_resume_line_drops_what_it_replaces():
    argv = ['sasrec', '--lr', '.1', '--out=a', '--save_dir', 'x', '--resume', 'never']
    assert resume_line(argv, Path('a b')) == "resume with: seqrec train sasrec --lr .1 --out 'a b' --resume auto"

@pytest.mark.parametrize('error, code', [(NonFinite('step 7: the loss is nan'), 3), (experiment.Interrupted('time budget'), 75),
                                         (KeyboardInterrupt(), 75), (RuntimeError('disk'), 1)])
def test_exit_codes(error, code, here, capsys, monkeypatch):
    def run(*a, **kw): raise error
    monkeypatch.setattr(experiment, 'run', run)
    assert main(['train', 'sasrec', 'walks.csv', '--out', 'run']) == code
    told = capsys.readouterr().err
    assert (str(error) in told) and ('resume with' in told) == (code == 75) and 'Traceback' not in told

def test_must_resume_needs_something_to_resume(here, capsys):
    assert main(['train', 'sasrec', 'walks.csv', *TINY, '--out', 'empty', '--resume', 'must']) == 1
    assert 'no sound checkpoint' in capsys.readouterr().err

# ---- data and doctor ----

def test_data_of_a_file(here, capsys):
    assert main(['data', 'walks.csv', '--protocol', 'P-bsa']) == 0
    told = capsys.readouterr().out
    assert 'walks under P-bsa' in told and '20 short (≤ 10), 20 medium (11–50), 20 long (> 50)' in told and 'fingerprint' in told

def test_doctor(capsys, monkeypatch):
    assert main(['doctor']) == 0
    told = capsys.readouterr().out
    for what in ('python', 'torch', 'cpu', 'cuda', 'allocator', 'attention', 'papermill', 'kaggle', 'mamba-ssm', 'cache', 'data sets'): assert what in told
    monkeypatch.setenv('SEQREC_DATA', '/no/such/folder')
    assert main(['doctor']) == 0 and 'not a folder' in capsys.readouterr().out

def test_doctor_says_why_a_device_does_not_work(monkeypatch):
    import seqrec_nb.doctor as doctor
    monkeypatch.setattr(doctor, 'probe', lambda d: 'no kernel image is available (sm_60)')
    found = doctor.device_finding('cuda', True)
    assert found.ok is False and 'sm_60' in found.detail and doctor.device_finding('mps', False).ok is None

@needs_data
@pytest.mark.parametrize('line, facts', [
    ('ml-1m --protocol P-seed', ['6,034', '3,533', '575,272', '162 short', '2,579 medium', '3,293 long', '1,000,209 rows']),
    ('ml-100k', ['943', '1,682', '100,000 rows', '0 short'])])
def test_data_of_named_sets(line, facts, data_dir, capsys):
    assert main(['data', *line.split()]) == 0
    told = capsys.readouterr().out
    assert [f for f in facts if f not in told] == []
