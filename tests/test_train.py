"The loop: what it refuses, what it repeats to the bit, when it stops, and that it learns."
import math
import numpy as np, pytest, torch
from seqrec_nb.core import reseed
from seqrec_nb.data.loader import EvalLoader, Loader
from seqrec_nb.data.sequences import Sequences
from seqrec_nb.data.splits import leave_one_out
from seqrec_nb.evaluate import ranks
from seqrec_nb.losses import LOSSES, make_loss
from seqrec_nb.metrics import averages
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.train import Callback, NonFinite, Trainer, backward

def histories(users=40, n_items=20, longest=30, seed=0, ring=False):
    "Random histories, or walks around a ring of items"
    rng = np.random.default_rng(seed); n = rng.integers(4, longest, users)
    one = lambda k: (rng.integers(n_items) + np.arange(k)) % n_items if ring else rng.integers(0, n_items, k)
    items = np.concatenate([one(k) for k in n]) + 1
    return leave_one_out(Sequences(items.astype(np.int32), np.r_[0, n.cumsum()], None, np.arange(users), np.arange(n_items)))

DATA = histories()

def trainer(data=DATA, seed=0, loss='ce', batch_size=8, max_len=12, samples='all', window='last', parts=4,
            model=None, threads=1, lr=3e-3, callbacks=(), **kw):
    reseed(seed, 'weights')
    arch = {k: kw.pop(k) for k in ('d_model', 'dropout', 'n_blocks', 'attn_dropout') if k in kw}
    model = model or SASRec(data.n_items, **{**dict(d_model=16, n_blocks=1, dropout=.2, max_len=max_len), **arch})
    loader = Loader(data.train, max_len, batch_size, samples, window, parts, seed)
    loss = make_loss(loss) if isinstance(loss, str) else loss
    return Trainer(model, loader, loss, lr, seed=seed, threads=threads, callbacks=callbacks, **kw)

class Steps(Callback):
    "Losses of all steps"
    def __init__(self): self.losses = []
    def on_step_end(self, t): self.losses.append(float(t.last_loss))

def weights(t): return {k: v.detach().clone() for k, v in t.model.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('threads', [1, 2])
def test_one_seed_one_run(loss, threads):
    def go(seed=0, noise=0):
        s = Steps(); t = trainer(seed=seed, loss=loss, threads=threads, callbacks=[s], attn_dropout=.1)
        torch.rand(noise); np.random.rand(noise + 1)
        return s.losses, weights(t.fit(2))
    (l1, w1), (l2, w2), (l3, w3) = go(), go(noise=5), go(1)
    assert l1 == l2 and same(w1, w2) and l1[0] != l3[0] and not same(w1, w3)

def test_bf16_repeats_with_threads():
    "Threads must not share torch's store of cast weights: who is faster would decide the rounding"
    runs = [weights(trainer(threads=2, precision='bf16', batch_size=40, d_model=32).fit(12)) for _ in range(3)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])

@pytest.mark.parametrize('threads', [1, 2])
def test_every_step_draws_anew(threads):
    "The same batch with the same weights: dropout is a function of the number of the step"
    t = trainer(dropout=.5, threads=threads); t.model.train(); parts = next(t.loader.steps(0)); losses = []
    for t.step in (0, 1, 0, 2): losses.append(float(backward(t, parts)[0]))
    assert losses[0] == losses[2] and len(set(losses)) == 3

def test_two_threads_are_close_to_one():
    "The same numbers in another order of sums: dropout too is a function of the part, not of the thread"
    runs = []
    for n in (1, 2):
        s = Steps(); t = trainer(threads=n, callbacks=[s]).fit(1); runs.append((s.losses, weights(t)))
        assert t.pool.n == n
    assert len(runs[0][0]) == 5 and np.allclose(runs[0][0], runs[1][0], atol=1e-5)
    assert all(torch.allclose(runs[0][1][k], runs[1][1][k], atol=1e-4) for k in runs[0][1])

def test_a_model_that_is_not_threadsafe_gets_one_thread():
    model = SASRec(DATA.n_items, d_model=16, max_len=12); model.threadsafe = False
    assert trainer(model=model, threads=2).pool.n == 1

def test_parts_of_a_step_do_not_change_its_gradient():
    "Loss and gradient are means over the targets of the whole step, however it is cut"
    found = []
    for parts in (1, 3):
        s = Steps(); t = trainer(parts=parts, batch_size=100, dropout=0., callbacks=[s]).fit(1)
        found.append((s.losses, t.params[0].grad))
    assert len(s.losses) == 1 and np.allclose(found[0][0], found[1][0], atol=1e-5) and torch.allclose(found[0][1], found[1][1], atol=1e-5)

def test_fit_in_pieces_is_fit_at_once():
    whole, parts = trainer().fit(4), trainer()
    for k in (1, 3, 4): parts.fit(k)
    assert same(weights(whole), weights(parts)) and parts.epoch == 4 and parts.step == whole.step

@pytest.mark.parametrize('window', ['last', 'random', 'every'])
def test_continuing_inside_an_epoch(window):
    class Stop(Callback):
        def on_step_end(self, t):
            if t.step == 7: t.stop = 'enough'
    whole, first = trainer(window=window).fit(3), trainer(window=window, callbacks=[Stop()]).fit(3)
    assert (first.epoch, first.step, first.stop) == (7 // first.loader.n_steps, 7, 'enough')
    other = trainer(window=window)
    other.model.item.weight.data.zero_()
    other.load({g: {k: v.clone() for k, v in d.items()} for g, d in first.tensors().items()}, first.state())
    assert same(weights(other.fit(3)), weights(whole)) and other.record['loss'] == whole.record['loss']

def test_record_is_the_mean_over_targets():
    seen = []
    class Look(Callback):
        def on_step_end(self, t): seen.append(float(t.last_loss))
    t = trainer(callbacks=[Look()]).fit(1)
    n = [sum(b.n_targets for b in parts) for parts in t.loader.steps(0)]
    assert math.isclose(t.record['loss'], np.dot(seen, n) / sum(n), rel_tol=1e-9) and t.record['targets'] == sum(n) == t.loader.n_targets
    assert {'epoch', 'step', 'loss', 'seconds', 'targets'} <= set(t.record) and t.record['epoch'] == 1

# refusals

class Timed(SASRec): uses_time = True
class Both(SASRec): causal = False
class Counted(SASRec): trainable = False

@pytest.mark.parametrize('kw, message', [
    (dict(cls=Both), "Use samples='prefix'"), (dict(cls=Timed), 'time=True'), (dict(cls=Counted), 'not trained'),
    (dict(precision='fp16'), 'fp16 needs a GPU'), (dict(precision='bf-16'), "did you mean 'bf16'"),
    (dict(max_len=12, model_len=11), 'windows of 12 items for a model of max_len 11')])
def test_refusals(kw, message):
    model = kw.pop('cls', SASRec)(DATA.n_items, d_model=8, max_len=kw.pop('model_len', 12))
    with pytest.raises(ValueError, match=message): trainer(model=model, **kw)

def test_what_is_not_refused():
    for samples in ('prefix', 'last'): trainer(model=Both(DATA.n_items, d_model=8, max_len=12), samples=samples)
    trainer(model=SASRec(DATA.n_items, d_model=8, max_len=30))

# settings of the update

def test_weight_decay_is_decoupled():
    "Without a gradient a weight shrinks by lr·decay a step; with 0 it stays"
    for decay in (0., .5):
        t = trainer(loss='bpr', weight_decay=decay, lr=1e-2, dropout=0.)
        t.model.item.weight.data[0] = 1.                             # the padding row gets no gradient
        t.fit(1)
        assert torch.allclose(t.model.item.weight[0], torch.full((16,), (1 - 1e-2 * decay) ** t.step))

def test_clip():
    class Norm(Callback):
        def __init__(self): self.norms = []
        def on_step_end(self, t): self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in t.params])))
    free, cut = Norm(), Norm()
    trainer(callbacks=[free]).fit(1); trainer(callbacks=[cut], clip=.05).fit(1)
    assert min(free.norms) > .1 and max(cut.norms) < .0501

@pytest.mark.parametrize('threads', [1, 2])
def test_bf16_trains(threads):
    runs = {}
    for p in ('fp32', 'bf16'):
        s = Steps(); t = trainer(histories(ring=True), precision=p, threads=threads, lr=1e-2, dropout=0., callbacks=[s]).fit(8); runs[p] = s.losses
        assert all(x.dtype == torch.float32 for x in t.params)
    a, b = np.array(runs['fp32']), np.array(runs['bf16'])
    assert (a != b).any() and np.abs(a - b)[:10].max() < .05 and b[-1] < .5 * b[0]

@pytest.mark.parametrize('loss', LOSSES)
def test_every_loss_falls(loss):
    t = trainer(histories(ring=True), loss=loss, lr=1e-2, dropout=0., threads=1)
    t.fit(1); first = t.record['loss']; t.fit(6)
    assert t.record['loss'] < .8 * first

# what is not finite

class Trap(torch.autograd.Function):
    "Nothing happens on the way in; on the way back one value breaks"
    @staticmethod
    def forward(ctx, x, value): ctx.value = value; return x.clone()
    @staticmethod
    def backward(ctx, g): g = g.clone(); g.view(-1)[0] = ctx.value; return g, None

class Faulty(SASRec):
    "Breaks at one step, as `fault` says; before it, it is SASRec"
    at, fault, value, t = 7, None, math.nan, None
    def body(self, x, b):
        due = self.training and self.t.step == self.at
        if due and self.fault == 'loss': x = x * self.value
        h = super().body(x, b)
        return h + 0 * Trap.apply(self.norm.bias, self.value) if due and self.fault == 'gradient' else h

class Snapshots(Callback):
    def __init__(self): self.all, self.error = [], 'unset'
    def on_fit_start(self, t): self.all.append(weights(t))
    def on_step_end(self, t): self.all.append(weights(t))
    def on_fit_end(self, t): self.error = t.error

def faulty(fault, look_every=1, at=7, value=math.nan, callbacks=(), **kw):
    model = (reseed(0), Faulty(DATA.n_items, d_model=16, n_blocks=1, max_len=12))[1]
    model.fault, model.at, model.value = fault, at, value
    s = Snapshots(); t = trainer(model=model, callbacks=[s, *callbacks], **kw)
    model.t, t.look_every = t, look_every
    return t, s

@pytest.mark.parametrize('clip', [None, 1.])
@pytest.mark.parametrize('look_every', [1, 50])
@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_broken_gradient_stops_before_the_update(value, threads, look_every, clip):
    t, s = faulty('gradient', look_every, value=value, threads=threads, clip=clip)
    with pytest.raises(NonFinite, match='step 7.*the loss is finite') as e: t.fit(3)
    users = ', '.join(map(str, torch.cat([b.user for b in next(iter(t.loader.steps(1, 2)))]).tolist()[:5]))
    assert t.loader.n_steps == 5 and f'batch 2 of its epoch, users {users}' in str(e.value)
    assert 'after 7 steps' in str(e.value) and same(weights(t), s.all[7]) and t.step == 7 and s.error is e.value
    assert f'1 of {len(t.params)} gradients are not, first norm.bias' in str(e.value)

@pytest.mark.parametrize('look_every', [1, 50])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_broken_loss_stops_before_the_update(value, look_every):
    t, s = faulty('loss', look_every, value=value)
    with pytest.raises(NonFinite, match='step 7 .*the loss is (nan|inf)'): t.fit(3)
    assert same(weights(t), s.all[7]) and t.step == 7 and t.step_in_epoch == 2 and t.epoch == 1

@pytest.mark.parametrize('look_every', [1, 50])
def test_a_broken_weight_is_named(look_every):
    class Break(Callback):
        def on_step_end(self, t):
            if t.step == 7: t.model.blocks[0].ffn.inner.weight.data[0, 0] = math.nan
    t = trainer(callbacks=[Break()]); t.look_every = look_every
    with pytest.raises(NonFinite, match=r'step 7 .*the parameter blocks.0.ffn.inner.weight held such a value'): t.fit(3)

@pytest.mark.parametrize('at', [0, 4, 5])
def test_the_first_and_last_step_of_an_epoch(at):
    t, s = faulty('gradient', 50, at)
    with pytest.raises(NonFinite, match=f'step {at} .batch {at % 5} '): t.fit(3)
    assert same(weights(t), s.all[at]) and (t.epoch, t.step_in_epoch) == divmod(at, 5)

def test_nothing_is_saved_after_a_break_that_nobody_has_looked_at():
    saved = []
    class Save(Callback):
        def on_step_end(self, t): t.tensors(); saved.append(t.step)
    t, s = faulty('gradient', 50, callbacks=[Save()])
    with pytest.raises(NonFinite, match='step 7'): t.fit(3)
    assert saved == list(range(1, 8)) and same(weights(t), s.all[7])

def test_a_repaired_run_goes_on():
    t, s = faulty('gradient')
    with pytest.raises(NonFinite): t.fit(3)
    t.model.fault = None; t.fit(3)
    assert same(weights(t), weights(trainer(model=(reseed(0), SASRec(DATA.n_items, d_model=16, n_blocks=1, max_len=12))[1]).fit(3)))

# hooks

class Tell(Callback):
    def __init__(self, who, log): self.who, self.log = who, log
    def _say(self, hook, t): self.log.append((self.who, hook, t.epoch, t.step, t.step_in_epoch, t.record.get('epoch')))
    def on_fit_start(self, t): self._say('fit_start', t)
    def on_epoch_start(self, t): self._say('epoch_start', t)
    def on_step_end(self, t): self._say('step_end', t)
    def on_epoch_end(self, t): self._say('epoch_end', t)
    def on_fit_end(self, t): self._say('fit_end', t); self.error = t.error

def test_hooks_in_order():
    log = []; a, b = Tell('a', log), Tell('b', log)
    trainer(callbacks=[a, b], batch_size=20).fit(2)
    want = [('fit_start', 0, 0, 0, None)]
    for e in range(2):
        want += [('epoch_start', e, 2 * e, 0, e or None)] + [('step_end', e, 2 * e + k, k, e or None) for k in (1, 2)]
        want += [('epoch_end', e + 1, 2 * e + 2, 0, e + 1)]
    want += [('fit_end', 2, 4, 0, 2)]
    assert log == [(who, *w) for w in want for who in 'ab'] and a.error is None

@pytest.mark.parametrize('hook', ['on_fit_start', 'on_epoch_start', 'on_step_end', 'on_epoch_end'])
@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_errors_reach_the_end_hook(hook, error):
    def fail(self, t): raise error('mine')
    log = []; a = Tell('a', log)
    t = trainer(callbacks=[a, type('Fails', (Callback,), {hook: fail})()])
    with pytest.raises(error, match='mine') as e: t.fit(1)
    assert a.error is e.value and log[-1][1] == 'fit_end'
    t.callbacks.pop(); t.fit(1)
    assert t.error is None and a.error is None

@pytest.mark.parametrize('hook, steps', [('on_fit_start', 0), ('on_epoch_start', 0), ('on_step_end', 1), ('on_epoch_end', 5)])
def test_stop(hook, steps):
    def stop(self, t): t.stop = 'enough'
    log = []; t = trainer(callbacks=[type('Stops', (Callback,), {hook: stop})(), Tell('a', log)]).fit(3)
    assert t.step == steps and t.stop == 'enough' and t.error is None and log[-1][1] == 'fit_end'
    assert [x[1] for x in log].count('step_end') == steps

# it learns

def test_a_cycle_is_learned_exactly():
    data = histories(users=60, n_items=12, ring=True)
    t = trainer(data, batch_size=16, lr=1e-2, d_model=32).fit(15)
    for split in (data.valid, data.test): assert averages(ranks(t.model, EvalLoader(split, 12), mask_seen=False), (1,))['HR@1'] == 1.

def test_twenty_users_are_learned_by_heart():
    data = histories(users=20, n_items=50, seed=3)
    t = trainer(data, batch_size=20, lr=1e-2, max_len=30, d_model=32, n_blocks=2, dropout=0.).fit(200)
    assert t.step == 200
    t.model.eval(); hits = []
    for parts in t.loader.steps(0):
        for b in parts:
            out = t.model(b); s = t.model.score(out.h, out.E)
            hits.append((s[..., 1:].argmax(-1) + 1 == b.target)[b.mask])
    assert torch.cat(hits).float().mean() > .95
