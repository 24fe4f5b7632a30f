"Callbacks around a stand-in trainer: what they decide, what they write, and that a resumed one decides the same."
import io, json, os, signal, threading, time
from types import SimpleNamespace
import pytest, torch
from seqrec_nb import callbacks as C
from seqrec_nb.callbacks import EarlyStopping, GracefulStop, History, Progress, Validate
from seqrec_nb.files import CheckpointError

class FakeTrainer(SimpleNamespace):
    "Counters, records and hooks of a trainer whose epochs do nothing"
    def __init__(self, *callbacks, epochs=10, **kw):
        super().__init__(callbacks=callbacks, epochs=epochs, epoch=0, step=0, step_in_epoch=0, seconds=1., stop=None, error=None, record={}, lr=1e-3,
                         model=torch.nn.Dropout(), loader=SimpleNamespace(n_steps=3), **kw)
    def call(self, hook):
        for c in self.callbacks: getattr(c, hook)(self)
    def fit(self):
        self.call('on_fit_start')
        while self.epoch < self.epochs and not self.stop:
            self.record = {}
            self.call('on_epoch_start')
            for self.step_in_epoch in (1, 2, 3):
                self.step += 1
                self.call('on_step_end')
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.record.update(epoch=self.epoch, step=self.step, loss=1 / self.epoch, seconds=.5, targets=100)
            self.call('on_epoch_end')
        self.call('on_fit_end')
        return self

def scores(values):
    "A score that reads its value from a list, one for each call"
    values = iter(values)
    return lambda model: {'NDCG@10': next(values)}

def test_best_epoch_is_the_first_of_the_highest():
    v = Validate(scores([.1, .3, .2, .3]))
    t, improved = FakeTrainer(v, epochs=4), []
    t.callbacks = (v, SimpleNamespace(**{h: lambda t: None for h in ('on_fit_start', 'on_epoch_start', 'on_step_end', 'on_fit_end')},
                                      on_epoch_end=lambda t: improved.append(v.improved)))
    t.fit()
    assert (v.best, v.best_epoch, improved) == (.3, 2, [True, True, False, False])
    assert t.record['valid'] == {'NDCG@10': .3}

def test_score_sees_an_evaluating_model_and_the_mode_comes_back():
    seen = []
    t = FakeTrainer(Validate(lambda m: seen.append((m.training, torch.is_grad_enabled())) or {'NDCG@10': .1}), epochs=1)
    t.model.train()
    t.fit()
    assert seen == [(False, False)] and t.model.training

def test_every_other_epoch_and_the_last():
    at = []
    v = Validate(lambda m: at.append(t.epoch) or {'NDCG@10': .1}, every=2)
    t = FakeTrainer(v, epochs=5)
    t.fit()
    assert at == [2, 4, 5] and v.best_epoch == 2

def test_what_cannot_be_compared_raises():
    with pytest.raises(KeyError, match='did you mean'): FakeTrainer(Validate(scores([.1]), monitor='NDCG@11')).fit()
    for bad in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='NDCG@10 is .* in epoch 1'): FakeTrainer(Validate(scores([bad]))).fit()

@pytest.mark.parametrize('patience, stop', [(1, 3), (2, 4), (3, 8), (0, 10)])
def test_early_stopping(patience, stop):
    values = [.1, .2, .1, .1, .3, .1, .1, .1, .1, .1]
    t = FakeTrainer(Validate(scores(values)), EarlyStopping(patience)).fit()
    assert t.epoch == stop and t.stop == (None if stop == 10 else 'early stopping')

def test_early_stopping_waits_for_the_first_validation():
    assert FakeTrainer(Validate(scores([.1, .2]), every=4), EarlyStopping(2), epochs=8).fit().epoch == 8

def test_early_stopping_needs_validation():
    with pytest.raises(ValueError, match='Validate'): FakeTrainer(EarlyStopping(3)).fit()

@pytest.mark.parametrize('cut', range(1, 9))
def test_resumed_callbacks_decide_as_before(cut):
    values = [.1, .2, .15, .3, .1, .2, .2, .1, .1]
    whole = FakeTrainer(Validate(scores(values)), EarlyStopping(3)).fit()
    first = FakeTrainer(Validate(scores(values)), EarlyStopping(3), epochs=cut).fit()
    state = json.loads(json.dumps(first.callbacks[0].state()))
    second = FakeTrainer(Validate(scores(values[cut:])), EarlyStopping(3))
    second.callbacks[0].load_state(state)
    second.epoch = first.epoch
    second.callbacks[1].on_epoch_end(second)   # what a restore does
    if second.stop: second.epochs = second.epoch
    second.fit()
    assert (second.epoch, second.stop, second.callbacks[0].state()) == (whole.epoch, whole.stop, whole.callbacks[0].state())

def test_twin_without_its_state_a_resumed_run_decides_otherwise():
    values = [.1, .3, .2, .2, .2, .2, .2, .2]
    whole = FakeTrainer(Validate(scores(values)), EarlyStopping(2)).fit()
    second = FakeTrainer(Validate(scores(values[3:])), EarlyStopping(2))
    second.epoch = 3
    second.fit()
    assert (whole.epoch, whole.callbacks[0].best_epoch) == (4, 2)
    assert (second.epoch, second.callbacks[0].best_epoch) == (6, 4)

def test_history(tmp_path):
    path = tmp_path/'run'/'history.jsonl'
    FakeTrainer(Validate(scores([.1, .2, .3])), History(path), epochs=3).fit()
    rows = C.read_history(path)
    assert [(r['epoch'], r['step'], r['valid']['NDCG@10']) for r in rows] == [(1, 3, .1), (2, 6, .2), (3, 9, .3)]
    assert rows[0]['targets_per_s'] == 200 and rows[0]['lr'] == 1e-3 and rows[0]['loss'] == 1 and rows[0]['memory_mb'] > 50
    assert path.read_bytes().endswith(b'\n') and C.read_history(tmp_path/'none') == []

def test_history_is_rewound_to_where_the_run_continues(tmp_path):
    path = tmp_path/'h.jsonl'
    whole = FakeTrainer(Validate(scores([.1] * 5)), History(path), epochs=5).fit()
    rows, text = C.read_history(path), path.read_bytes()
    for cut in (*range(0, len(text), 41), len(text)):
        for epoch in range(sum(end <= cut for end, _ in ends(text)) + 1):
            path.write_bytes(text[:cut])
            C.rewind(path, epoch)
            assert C.read_history(path) == rows[:epoch] and path.read_bytes() == text[:len(path.read_bytes())]
    t = FakeTrainer(Validate(scores([.1] * 3)), History(path), epochs=5)
    path.write_bytes(text[:-20])
    t.epoch, t.step = 2, 6
    t.fit()
    untimed = lambda rows: [{k: r[k] for k in ('epoch', 'step', 'loss', 'valid')} for r in rows]
    assert untimed(C.read_history(path)) == untimed(rows)

def test_twin_without_rewinding_rows_double(tmp_path, monkeypatch):
    def resumed(path):
        FakeTrainer(Validate(scores([.1] * 3)), History(path), epochs=3).fit()
        t = FakeTrainer(Validate(scores([.1] * 3)), History(path), epochs=4)
        t.epoch = 1   # the checkpoint was older than the history
        return [r['epoch'] for r in C.read_history((t.fit(), path)[1])]
    assert resumed(tmp_path/'a.jsonl') == [1, 2, 3, 4]
    monkeypatch.setattr(C, 'rewind', lambda path, epoch: None)
    assert resumed(tmp_path/'b.jsonl') == [1, 2, 3, 2, 3, 4]

def ends(text): return [(i + 1, None) for i, c in enumerate(text) if c == ord('\n')]

def test_history_refuses_nan(tmp_path):
    t = FakeTrainer(History(tmp_path/'h.jsonl'))
    t.record = dict(epoch=1, loss=float('nan'), seconds=1., targets=1)
    with pytest.raises(ValueError): t.call('on_epoch_end')

def broken(*a): raise OSError(28, 'No space left on device')

def test_history_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(C, 'add', broken)
    with pytest.raises(CheckpointError, match=r'h\.jsonl: epoch 1 not recorded: No space left'): FakeTrainer(History(tmp_path/'h.jsonl'), epochs=3).fit()

def test_history_waits_for_the_disk(tmp_path, monkeypatch):
    path, out = tmp_path/'h.jsonl', io.StringIO()
    t = FakeTrainer(History(path, 'warn'), Progress(out), epochs=2)
    with monkeypatch.context() as m:
        m.setattr(C, 'add', broken)
        with pytest.raises(CheckpointError): t.fit()   # nothing is on the disk at the end
        state = json.loads(json.dumps(t.callbacks[0].state()))
    assert '! ' in out.getvalue() and 'epoch 1 not recorded' in out.getvalue() and not path.exists()
    assert len(state['waiting']) == 2
    t = FakeTrainer(History(path, 'warn'), epochs=3)
    t.callbacks[0].load_state(state)
    t.epoch = 2
    t.fit()
    assert [r['epoch'] for r in C.read_history(path)] == [1, 2, 3] and t.callbacks[0].state() == {}

@pytest.mark.parametrize('kind', ['a full disk', 'a closed terminal'])
def test_training_does_not_depend_on_who_looks(kind, tmp_path, monkeypatch):
    class Out(Tty if kind == 'a closed terminal' else io.StringIO):
        def write(self, text): broken()
    assert FakeTrainer(Progress(Out()), epochs=3).fit().epoch == 3
    monkeypatch.setattr(Progress, 'show', lambda self, text, how='keep': getattr(self.screen, how)(text))   # twin
    with pytest.raises(OSError): FakeTrainer(Progress(Out()), epochs=3).fit()

def test_a_log_by_its_name_outlives_its_file(tmp_path):
    path = tmp_path/'run.log'
    path.write_text('before\n')
    t = during(FakeTrainer(Progress(path), epochs=3), 4, path.unlink).fit()
    assert [l.split()[0] for l in path.read_text().splitlines()] == ['epoch', 'epoch', 'finished']

def test_announcements_reach_every_screen_or_warn():
    a, b = io.StringIO(), io.StringIO()
    t = FakeTrainer(Progress(a), Progress(b))
    t.call('on_fit_start')
    C.announce(t, 'hello')
    assert a.getvalue() == b.getvalue() == 'hello\n'
    with pytest.warns(UserWarning, match='hello'): C.announce(FakeTrainer(), 'hello')

class Tty(io.StringIO):
    def isatty(self): return True

def test_progress_in_a_log_has_one_plain_line_an_epoch():
    out = io.StringIO()
    FakeTrainer(Validate(scores([.1, .3, .2])), Progress(out), epochs=3).fit()
    lines = out.getvalue().splitlines()
    assert '\r' not in out.getvalue() and '\x1b' not in out.getvalue() and len(lines) == 4
    assert lines[1] == 'epoch 2/3  loss 0.5000  NDCG@10 0.3000 *  0.5 s  200 targets/s'
    assert lines[3] == 'finished after 3 epochs; best NDCG@10 0.3000 in epoch 2'

def test_progress_in_a_terminal_overwrites_within_the_epoch(monkeypatch):
    clock = iter(range(1, 10**6))
    monkeypatch.setattr(C.time, 'monotonic', lambda: float(next(clock)))
    out = Tty()
    FakeTrainer(Progress(out), epochs=2).fit()
    first, second, last, rest = out.getvalue().split('\n')
    steps = first.split('\r')
    assert [s.split('  ')[1] for s in steps[1:-1]] == ['step 1/3', 'step 2/3', 'step 3/3'] and rest == ''
    assert steps[-1].startswith('epoch 1/2  loss 1.0000') and len(steps[-1]) >= len(steps[-2]), 'nothing of the longer line is left'
    assert last.strip() == 'finished after 2 epochs'

NOTEBOOK = """
import sys; sys.path.insert(0, 'tests')
from test_callbacks import FakeTrainer, Progress
FakeTrainer(Progress(), epochs=5).fit();
"""

def test_progress_in_a_notebook_is_one_display_with_text(request):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(nb, kernel_name='python3', resources=dict(metadata=dict(path=request.config.rootpath))).execute()
    (out,) = nb.cells[0].outputs
    assert out.output_type == 'display_data' and out.data['text/plain'] == 'finished after 5 epochs'
    assert '<pre' in out.data['text/html'] and 'widget' not in str(out.data)

def during(t, n, do):
    "Do something at the n-th step of a run"
    def on_step_end(t):
        if t.step == n: do()
    none = {h: lambda t: None for h in ('on_fit_start', 'on_epoch_start', 'on_epoch_end', 'on_fit_end')}
    t.callbacks = (SimpleNamespace(on_step_end=on_step_end, **none), *t.callbacks)
    return t

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_the_trainer_to_stop(number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    t = during(FakeTrainer(GracefulStop()), 4, lambda: os.kill(os.getpid(), number)).fit()
    assert t.stop == 'interrupted' and t.epoch == 2, 'this stand-in finishes its epoch'
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

def test_second_ctrl_c_is_an_ordinary_one():
    before = signal.getsignal(signal.SIGINT)
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.01)
    t = during(FakeTrainer(GracefulStop()), 4, twice)
    with pytest.raises(KeyboardInterrupt): t.fit()
    t.call('on_fit_end')
    assert signal.getsignal(signal.SIGINT) == before

def test_time_budget_and_no_signals_outside_the_main_thread(monkeypatch):
    t = FakeTrainer(GracefulStop(budget=.05), epochs=1000)
    during(t, 2, lambda: time.sleep(.06))
    worker = threading.Thread(target=t.fit)
    worker.start()
    worker.join()
    assert (t.stop, t.epoch) == ('time budget', 1)

def test_an_interruption_is_not_renamed_by_early_stopping():
    t = FakeTrainer(Validate(lambda m: setattr(t, 'stop', 'interrupted') or {'NDCG@10': .1}), EarlyStopping(1))
    t.callbacks[0].load_state(dict(best=.2, best_epoch=1, last_epoch=4))
    t.epoch = 4
    t.fit()
    assert t.stop == 'interrupted' and t.epoch == 5
