"A run that breaks: what the report names, when it goes back by itself, and what it does when memory runs out."
import ast, json, math, os, signal
from multiprocessing import get_context
from types import SimpleNamespace
import pytest, torch
from conftest import ROOT
from seqrec_nb import blame, gradients, train, workers
from seqrec_nb.callbacks import History, read_history
from seqrec_nb.checkpoint import Checkpoint
from seqrec_nb.core import reseed, rng
from seqrec_nb.gradients import TooLarge, backward
from seqrec_nb.losses import CrossEntropy
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.parallel import World
from seqrec_nb.recover import Audit, Rewind
from seqrec_nb.train import Callback, NonFinite
from test_train import DATA, Steps, Trap, histories, same, trainer, weights

def model(cls=SASRec, **kw): return (reseed(0), cls(DATA.n_items, **{**dict(d_model=8, n_blocks=1, max_len=12), **kw}))[1]

def message(t, epochs=3):
    with pytest.raises(NonFinite) as e: t.fit(epochs)
    return str(e.value)

def breaking(name, fault, at=7, **kw):
    "A trainer whose module `name` is changed by `fault(output)` in step `at`"
    t = trainer(model=model(), **kw)
    def change(module, args, out): return fault(out) if t.step == at and t.model.training else out
    t.model.get_submodule(name).register_forward_hook(change)
    return t

def first_row_nan(x): return torch.cat([x[:1] * math.nan, x[1:]])

# row 13: the report

class Keep(Callback):
    "The weights after each step"
    def __init__(self): self.all = []
    def on_fit_start(self, t): self.all.append(weights(t))
    def on_step_end(self, t): self.all.append(weights(t))

@pytest.mark.parametrize('threads, look_every, precision', [(1, 1, 'fp32'), (2, 1, 'fp32'), (1, 50, 'fp32'), (2, 50, 'bf16')])
def test_the_module_that_broke_first_is_named(threads, look_every, precision):
    keep = Keep(); t = breaking('blocks.0.ffn.inner', first_row_nan, threads=threads, precision=precision, callbacks=[keep])
    t.look_every = look_every
    said = message(t)
    user = next(iter(t.loader.steps(1, 2)))[0].user[0].item()
    assert f'forward: the first bad output is that of blocks.0.ffn.inner (Linear): ' in said and f'users {user}; its input was finite' in said
    assert said.startswith('step 7 (batch 2 of its epoch') and 'the weights are those after 7 steps' in said and same(weights(t), keep.all[7])
    assert (t.epoch, t.step, t.step_in_epoch) == (1, 7, 2) and len(said.splitlines()) <= 8

def test_twin_without_the_hooks_nobody_knows_where(monkeypatch):
    monkeypatch.setattr(blame.Watch, 'note', lambda *a: None)
    said = message(breaking('blocks.0.ffn.inner', first_row_nan))
    assert 'ffn.inner (Linear)' not in said and 'gradients' in said

@pytest.mark.parametrize('guarded', [True, False])
def test_twin_without_the_guard_nan_reaches_the_weights(guarded, monkeypatch):
    if not guarded: monkeypatch.setattr(train, 'update', lambda t, loss: t.opt.step())
    t = breaking('blocks.0.ffn.inner', first_row_nan)
    if guarded: message(t)
    else: t.fit(3)
    assert t.step == (7 if guarded else 15) and all(p.isfinite().all() for p in t.params) == guarded

@pytest.mark.parametrize('threads, look_every', [(1, 1), (2, 50)])
def test_the_place_where_a_gradient_broke_is_named(threads, look_every):
    t = breaking('blocks.0', lambda x: Trap.apply(x, math.nan), threads=threads); t.look_every = look_every
    said = message(t)
    assert 'the loss is finite' in said and 'backward: the gradient is finite at the output of blocks.0 (' in said
    assert 'and not at the output of blocks.0.' in said and 'norm.weight' in said.split('largest finite norms')[1].splitlines()[0]

def test_a_loss_that_broke_is_named():
    class Bad(CrossEntropy):
        def __call__(self, model, out, b): return super().__call__(model, out, b) * (math.inf if t.step == 3 else 1)
    t = trainer(loss=Bad())
    assert 'forward: all modules are finite, the loss (Bad) is not' in message(t)

def test_what_cannot_be_repeated_is_said():
    times = []
    t = breaking('blocks.0', lambda x: x * math.nan if times.append(1) or len(times) == 1 else x)
    said = message(t)
    assert 'finite when it is computed again' in said and t.step == 7

@pytest.mark.parametrize('look_every', [1, 50])
def test_the_report_leaves_everything_as_it_was(look_every):
    class Counts(SASRec):
        def __init__(self, *a, **kw): super().__init__(*a, **kw); self.register_buffer('calls', torch.zeros(()))
        def body(self, x, b): self.calls += 1; torch.rand(1); return super().body(x, b)
    t = trainer(model=model(Counts)); t.model.train(); t.look_every = look_every
    t.step, t.bad = 2, torch.tensor(2); backward(t, next(t.loader.steps(0, 2)))
    grads, before, state = [p.grad.clone() for p in t.params], weights(t), torch.get_rng_state()
    hooks = lambda: sum(len(m._forward_hooks) for m in t.model.modules())
    t.step_in_epoch, n = 2, hooks(); t.model.blocks[0].eval()
    with pytest.raises(NonFinite): train.look(t)
    assert same(weights(t), before) and torch.equal(torch.get_rng_state(), state) and hooks() == n
    assert all(torch.equal(p.grad, g) for p, g in zip(t.params, grads)) and t.model.training

def test_the_last_good_checkpoint_is_named(tmp_path):
    class Where(Checkpoint):
        def where(self): return dict(path=str(self.run/'last'), epoch=self.saved[0], step=self.saved[1])
    cls = Checkpoint if hasattr(Checkpoint, 'where') else Where
    t = breaking('blocks.0', first_row_nan, callbacks=[cls(tmp_path, every_seconds=0)])
    assert f"last good checkpoint: {tmp_path/'last'}: epoch 1, step 5" in message(t)
    assert 'last good checkpoint: none is known' in message(breaking('blocks.0', first_row_nan))

# row 13: going back

class Cliff(SASRec):
    "Falls in step 7 if the learning rate is above `edge`"
    edge = 2e-3
    def body(self, x, b):
        return super().body(x * math.nan if self.training and self.t.step == 7 and self.t.lr > self.edge else x, b)

def cliff(*callbacks, edge=2e-3, **kw):
    t = trainer(model=model(Cliff), callbacks=callbacks, **kw)
    t.model.t, t.model.edge = t, edge
    return t

class Quiet(Callback):
    "Where progress would be shown"
    def __init__(self): self.said = []
    def show(self, text): self.said.append(text)

@pytest.mark.parametrize('threads, look_every', [(1, 1), (2, 50)])
def test_rewind_is_what_one_would_do_by_hand(threads, look_every, tmp_path):
    quiet = Quiet()
    t = cliff(Rewind(), History(tmp_path/'h.jsonl'), quiet, Checkpoint(tmp_path, every_seconds=0), threads=threads)
    t.look_every = look_every; t.fit(3)
    first = cliff(threads=threads).fit(1); byhand = cliff(threads=threads)
    byhand.load(first.tensors(), first.state()); byhand.set_lr(1.5e-3); byhand.fit(3)
    assert same(weights(t), weights(byhand)) and t.lr == 1.5e-3 and (t.epoch, t.step) == (3, 15)
    (event,) = t.events
    assert 'Rewind 1 of 3: back from step 7 to step 5, on with lr 0.0015' in event and quiet.said == [f'! {event}']
    rows = read_history(tmp_path/'h.jsonl')
    assert [r.get('events') for r in rows] == [None, [event], [event]] and [r['lr'] for r in rows] == [3e-3, 1.5e-3, 1.5e-3]

def test_without_a_checkpoint_it_begins_again():
    t, slow = cliff(Rewind(), Quiet()).fit(3), cliff(lr=1.5e-3).fit(3)
    assert same(weights(t), weights(slow)) and t.step == 15

def test_twin_stop_stops():
    t = cliff(Quiet())
    assert 'lr (it is 0.003)' in message(t) and t.rescue is None

@pytest.mark.parametrize('factor, edge', [(.5, 0.), (1., 2e-3)])
def test_three_times_then_the_report(factor, edge):
    "A cause that is no matter of the rate; and the twin: without the halving the same NaN comes again"
    quiet = Quiet(); t = cliff(Rewind(factor=factor), quiet, edge=edge)
    said = message(t)
    assert 'rewound 3 times already' in said and 'forward: ' in said and len(quiet.said) == 3 and t.lr == 3e-3 * factor ** 3

class Killed(BaseException): pass

class KillAt(Callback):
    "Dies after a step, once there was a rewind"
    def __init__(self, step): self.step = step
    def on_step_end(self, t):
        if t.events and t.step == self.step: raise Killed

def killed_and_resumed(folder, step=7):
    make = lambda *c: cliff(Rewind(), Quiet(), *c, Checkpoint(folder, every_seconds=0))
    with pytest.raises(Killed): make(KillAt(step)).fit(3)
    return make().fit(3)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run with one rewind that nobody kills"
    return cliff(Rewind(), Quiet(), Checkpoint(tmp_path_factory.mktemp('whole'), every_seconds=0)).fit(3)

@pytest.mark.parametrize('step', [6, 11])
def test_the_lower_rate_survives_a_kill(step, whole, tmp_path):
    t = killed_and_resumed(tmp_path, step)
    assert same(weights(t), weights(whole)) and t.lr == 1.5e-3 and t.events == whole.events and t.callbacks[0].done == 1

def test_twin_a_state_without_lr_forgets_it(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'CHANGED', ('events',))
    t = killed_and_resumed(tmp_path, 11)                    # the cliff is behind it, the rate is 0.003 again
    assert not same(weights(t), weights(whole)) and t.lr == 3e-3

def test_states_of_older_versions_load():
    first = trainer().fit(1); t = trainer(lr=1e-4); state = first.state()
    t.load(first.tensors(), {k: v for k, v in state.items() if k not in train.CHANGED})
    assert (t.lr, t.pieces, t.events, t.epoch) == (1e-4, 0, [], 1)
    t.load(first.tensors(), json.loads(json.dumps(state)))
    assert t.lr == 3e-3 == t.opt.param_groups[0]['lr']

# row 34: memory

class Small(SASRec):
    "A machine on which at most `room` rows fit"
    room, biggest = 1000, 0
    def body(self, x, b):
        if len(b) > self.room: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate much')
        self.biggest = max(self.biggest, len(b))
        return super().body(x, b)

EIGHT = histories(users=64)            # two steps of four parts of eight rows

def small(room, loss='ce', cls=Small, on_oom='halve', **kw):
    kw = {**dict(data=EIGHT, batch_size=32, dropout=0., threads=1), **kw}
    t = trainer(model=model(cls, dropout=kw.pop('dropout')), loss=loss, on_oom=on_oom, **kw)
    t.model.room = room
    return t

class Scaled(Small):
    "A computed table, as a graph model has, and a penalty"
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.gain = torch.nn.Parameter(torch.ones(8))
    def table(self): return self.item.weight * self.gain
    def body(self, x, b): return super().body(x, b), dict(penalty=(self.gain ** 2).sum())

def gradient(t):
    loss, n = backward(t, next(t.loader.steps(0)))
    return loss, [p.grad.clone() for p in t.params]

def close(a, b, atol=1e-6): return all(torch.allclose(x, y, atol=atol, rtol=1e-5) for x, y in zip(a, b))

@pytest.mark.parametrize('loss, cls, threads', [('ce', Small, 1), ('ce', Small, 2), ('ss', Small, 1), ('ce', Scaled, 1), ('ss', Scaled, 2)])
@pytest.mark.parametrize('room, pieces', [(8, 1), (7, 2), (1, 8)])
def test_smaller_batches_give_the_same_gradient(room, pieces, loss, cls, threads):
    "Eight rows a part: it does not fit until a part is cut"
    want_loss, want = gradient(small(1000, loss, cls, threads=threads))
    t = small(room, loss, cls, threads=threads, callbacks=[quiet := Quiet()])
    if room == 8: t.pieces = 1
    for _ in range(2): loss_, got = gradient(t)                       # the second time it is small at once
    assert t.pieces == pieces and t.model.biggest <= room and torch.allclose(loss_, want_loss, atol=1e-6) and close(got, want)
    assert len(quiet.said) == len(t.events) == (0 if room == 8 else int(math.log2(pieces)) + 1)

def test_a_run_goes_on_in_smaller_pieces(tmp_path):
    s, s2, quiet = Steps(), Steps(), Quiet()
    small(1000, callbacks=[s]).fit(2)
    t = small(3, callbacks=[s2, quiet, History(tmp_path/'h'), Checkpoint(tmp_path)]).fit(2)
    assert close(map(torch.tensor, s.losses), map(torch.tensor, s2.losses), 1e-4) and t.pieces == 4
    assert len(quiet.said) == 3 and all('step 0 ran out of memory (CUDA out of memory)' in x for x in quiet.said)
    assert [r['micro_batches'] for r in read_history(tmp_path/'h')] == [4, 4] and 'not to the bit' in t.record['events'][-1]
    again = small(3, callbacks=[Quiet(), Checkpoint(tmp_path)]).fit(3)
    assert again.pieces == 4 and again.events == t.events, 'a resumed run stays at that size'

def test_twin_without_the_weights_the_gradient_is_another(monkeypatch):
    "Pieces count by their targets: as if all were alike, the mean is wrong, and nothing would say so"
    right = gradients.cut
    def alike(b, pieces):
        made = right(b, pieces)
        for p in made: p.n_targets = b.n_targets / len(made)
        return made
    def go(room): return gradient(small(room, parts=1, batch_size=64, callbacks=[Quiet()]))[1]
    want, good = go(1000), go(16)
    monkeypatch.setattr(gradients, 'cut', alike)
    off = [(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, want)) for found in (good, go(16))]
    assert max(off[0]) < 1e-4 and max(off[1]) > .01

def test_stop_is_the_default_and_a_single_row_is_the_end():
    with pytest.raises(torch.OutOfMemoryError): small(4, on_oom='stop').fit(1)
    assert trainer().on_oom == 'stop'
    t = small(0, callbacks=[quiet := Quiet()])
    with pytest.raises(TooLarge, match='step 0: a single row is too much.*Make max_len or d_model smaller'): t.fit(1)
    assert t.pieces == 8 and len(quiet.said) == 4 and t.step == 0
    with pytest.raises(ValueError, match="did you mean 'halve'"): small(4, on_oom='half')

def test_every_halving_halves_what_is_kept():
    "Bytes of activations that autograd holds at the same time"
    t = small(1000, batch_size=128, data=histories(users=128)); weights_ = {p.untyped_storage().data_ptr() for p in t.params}
    def peak(pieces):
        live, now, top = {}, 0, 0
        class Kept:
            def __init__(self, x):
                nonlocal now, top
                self.x, self.key = x, x.untyped_storage().data_ptr()
                if self.key not in weights_ and self.key not in live: now += x.untyped_storage().nbytes()
                live[self.key] = live.get(self.key, 0) + 1; top = max(top, now)
            def __del__(self):
                nonlocal now
                live[self.key] -= 1
                if not live[self.key]:
                    del live[self.key]
                    if self.key not in weights_: now -= self.x.untyped_storage().nbytes()
        t.pieces = pieces
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x): backward(t, next(t.loader.steps(0)))
        return top
    tops = [peak(k) for k in (0, 1, 2, 4, 8)]
    assert tops[1] < .5 * tops[0] and all(.45 < b / a < .6 for a, b in zip(tops[1:], tops[2:])), tops

class Alone(World):
    "One of two processes, whose gradients are added later"
    def add_up(self, loss, params): return loss

def test_each_process_halves_on_its_own():
    parts = next(small(1000).loader.steps(0)); loss, want = gradient(small(1000)); got = []
    for rank, room in ((0, 1000), (1, 3)):
        t = small(room, callbacks=[Quiet()]); l, _ = backward(t, parts, Alone(rank, 2)); got.append((l, [p.grad for p in t.params]))
        assert (t.pieces > 0) == (rank == 1)
    assert torch.allclose(got[0][0] + got[1][0], loss, atol=1e-6) and close([a + b for a, b in zip(got[0][1], got[1][1])], want)

def test_a_scaled_loss_is_scaled_in_pieces_too():
    t = small(4, callbacks=[Quiet()]); t.scaler = SimpleNamespace(scale=lambda x: 8 * x)
    assert close([g / 8 for g in gradient(t)[1]], gradient(small(1000))[1])

def test_pieces_have_dropout_of_their_own_and_repeat():
    a, b = (gradient(small(4, dropout=.5, callbacks=[Quiet()]))[1] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    drawn = []
    t = small(1000); t.step = 3
    for at in ((0,), (0, 0), (0, 1), (1,)):
        with gradients.draws(t, *at): drawn.append(torch.rand(1, generator=rng()).item())
    assert len(set(drawn)) == 4

def test_a_nan_in_a_run_of_small_pieces_is_reported():
    t = small(4, callbacks=[Quiet()]); t.model.blocks[0].register_forward_hook(lambda m, a, out: out * math.nan if t.step == 2 else out)
    assert 'forward: the first bad output is that of blocks.0 ' in message(t) and t.model.biggest <= 4

# a parameter that learns nothing

def test_a_parameter_without_a_gradient_is_named():
    t = trainer(callbacks=[Audit(), quiet := Quiet()]); t.model.forgotten = torch.nn.Parameter(torch.ones(2)); t.fit(2)
    assert len(quiet.said) == 1 and '1 parameters have received no gradient in 5 steps: forgotten' in t.record['events'][0]
    t.model.forgotten.requires_grad_(False)
    for audit in (Audit(), Audit(steps=2)):
        good = trainer(callbacks=[audit]).fit(1)
        assert not good.events and 'events' not in good.record

# row 35: workers

def processes_in(text):
    "Names in a piece of code that start data workers or forked processes"
    bad = {'DataLoader', 'fork', 'forkserver', 'ForkingPickler', 'forkpty'}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr in bad: yield node.attr
        if isinstance(node, ast.Name) and node.id in bad: yield node.id
        if isinstance(node, ast.Constant) and node.value in bad: yield node.value
        if isinstance(node, ast.alias) and (node.name in bad or node.name.startswith(('torch.multiprocessing', 'torch.utils.data'))): yield node.name
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith(('torch.multiprocessing', 'torch.utils.data')): yield node.module

def test_no_data_worker_and_no_fork():
    "Data are arrays on the device: there is no worker that could die, and no process is forked from one that uses CUDA"
    found = {p.name: [*processes_in(p.read_text(encoding='utf-8'))] for p in (ROOT/'seqrec_nb').rglob('*.py')}
    assert len(found) > 40 and not {k: v for k, v in found.items() if v}
    assert "get_context('spawn')" in (ROOT/'seqrec_nb/workers.py').read_text(encoding='utf-8')

@pytest.mark.parametrize('code', ['from torch.utils.data import Dataset', 'import torch\nx = torch.utils.data.DataLoader(d)', 'import os\nos.fork()',
                                  "get_context('fork')", 'import torch.multiprocessing as mp'])
def test_data_workers_and_forks_are_seen(code): assert [*processes_in(code)]

@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_a_killed_worker_is_named_and_the_others_finish(monkeypatch):
    "Two workers and four jobs; one of them is killed by force in the middle"
    def attempt(job, callbacks=()):
        if job.row == 'doomed': os.kill(os.getpid(), signal.SIGKILL)
        return 'done', ''
    jobs = [SimpleNamespace(row=r, out=r) for r in ('a', 'doomed', 'b', 'c')]; ends = {}
    class Board:
        workers = 2
        def waiting(self, busy=()): return [j for j in jobs if j.row not in ends and j.row not in busy]
        def ended(self, job, how, why, *rest): ends[job.row] = how, why
    for name, value in dict(attempt=attempt, is_trained=lambda j: False, get_context=lambda kind: get_context('fork')).items():
        monkeypatch.setattr(workers, name, value)                     # forked here: nothing of torch runs in them
    workers.together(Board())
    assert {k: how for k, (how, _) in ends.items()} == dict(a='done', b='done', c='done', doomed='failed')
    assert 'SIGKILL' in ends['doomed'][1] or '-9' in ends['doomed'][1]
