"check_model passes on what is sound and catches each published fault; SASRec over long windows; making models by name."
import math, re
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from torch import nn
from seqrec_nb.core import Batch, drawing, reseed
from seqrec_nb.data.splits import load
from seqrec_nb.models.base import CHECKS, MODELS, SeqModel, check_model, create, model_class, register_model, settings
from seqrec_nb.models.sasrec import SASRec

SMALL = dict(d_model=16, n_heads=2, dropout=0., max_len=12)
VARIANTS = [dict(), dict(norm='post'), dict(norm='query'), dict(positions='start'), dict(positions='none'), dict(activation='gelu'),
            dict(activation='silu'), dict(scale_input=True), dict(d_inner=48), dict(n_blocks=1, n_heads=1), dict(n_blocks=3, n_heads=4),
            dict(attn_dropout=.3), dict(dropout=.3), dict(max_len=10), dict(max_len=3), dict(norm='query', positions='start', n_heads=1)]

@pytest.mark.parametrize('kw', VARIANTS, ids=str)
def test_every_variant_passes_every_check(kw):
    done = check_model(SASRec, **{**SMALL, **kw})
    assert list(done) == [*CHECKS, 'overfit'] and float(done['overfit'].split('%')[0]) < 5

@pytest.mark.parametrize('n_items', [3, 5, 500])
def test_any_catalogue_passes(n_items): check_model('sasrec', n_items, **SMALL)

# every fault below was published in somebody's code

class Sums(SeqModel):
    "Running sum of the items with weights that grow towards the last one, then a layer: sound, and easy to break"
    def __init__(self, n_items, d_model=16, max_len=12):
        super().__init__(n_items, d_model, max_len)
        self.layer = nn.Linear(d_model, d_model)
    def body(self, x, b):
        x = x * b.mask[..., None]
        at = torch.arange(x.shape[1])
        w = (.5 ** (at[:, None] - at)).tril()
        return x + self.layer(w @ x).tanh()

class StaleReadout(Sums):
    "Left-padding, read where a right-padded row would end"
    def scores(self, b, E=None):
        n = b.mask.sum(1)
        at = torch.arange(b.items.shape[1]) - (b.items.shape[1] - n)[:, None]
        items = b.items.gather(1, at.clamp_min(0)) * (at >= 0)
        out = self(Batch(items, length=b.length), E)
        return self.score(out.h[torch.arange(len(n)), n - 1], out.E, b)

class LooksAhead(Sums):
    def body(self, x, b): return super().body(x, b) + super().body(x.flip(1), Batch(b.items.flip(1))).flip(1)

class FromTheRight(Sums):
    "Positions counted from the end of the padded window"
    def __init__(self, *a, **kw):
        super().__init__(*a, **kw); self.position = nn.Embedding(self.max_len, self.d_model)
    def embed(self, E, b): return super().embed(E, b) + self.position(torch.arange(b.items.shape[1]).flip(0))

class ReadsPadding(Sums):
    "Vectors of padding are summed as if they were items"
    def body(self, x, b): return super().body(x, b) + (x * ~b.mask[..., None]).sum(1, keepdim=True)

class MeanOfBatch(Sums):
    "Statistics over the rows of a batch"
    def body(self, x, b): h = super().body(x, b); return h - h[:, :1].mean(0, keepdim=True)

class NeverTrained(Sums):
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.spare = nn.Linear(4, 4)

class FrozenTable(Sums):
    "Item vectors computed once without gradients"
    def table(self): return self.item.weight.detach()

class NanGradient(Sums):
    "A norm of nothing"
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.gate = nn.Parameter(torch.zeros(1))
    def body(self, x, b): return super().body(x, b) * (1 + self.gate.square().sum().sqrt())

class ForgetsState(Sums):
    "A weight that no checkpoint holds"
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.hidden = [torch.zeros(())]
    def scores(self, b, E=None): self.hidden[0] = self.hidden[0] + 1; return super().scores(b, E) * self.hidden[0]

class HiddenWeight(Sums):
    "A weight that is not in the state: saved and loaded, the model is another"
    def __init__(self, *a, **kw): super().__init__(*a, **kw); self.w = nn.Parameter(torch.ones(1))
    def body(self, x, b): return super().body(x, b) * self.w
    def state_dict(self, *a, **kw): return {k: v for k, v in super().state_dict(*a, **kw).items() if k != 'w'}
    def load_state_dict(self, state, strict=True): return super().load_state_dict(state, strict=False)

class WrongTable(Sums):
    "A catalogue of one item more"
    def table(self): return torch.cat([self.item.weight, self.item.weight[:1]])

class InfiniteScore(Sums):
    def scores(self, b, E=None): s = super().scores(b, E).clone(); s[:, -1] = torch.inf; return s

class LearnsNothing(Sums):
    "Scores that hardly depend on the weights"
    def score(self, h, E, b=None, items=None): return super().score(h, E, b, items).tanh() * 1e-2

class IgnoresTheLast(Sums):
    def body(self, x, b): return super().body(F.pad(x, (0, 0, 1, 0))[:, :-1] * (b.items > 0)[..., None], b)

class ShortRowsAlike(Sums):
    "Reads the last item only where the history has more than three"
    def body(self, x, b):
        long = b.mask.cumsum(1)[..., None] > 3
        return super().body(x, b) * long + self.layer.bias * (~long) + x * 0

FAULTS = [(StaleReadout, 'last item'), (IgnoresTheLast, 'last item'), (ShortRowsAlike, 'last item'), (LooksAhead, 'causal'), (FromTheRight, 'padding'),
          (ReadsPadding, 'padding'), (MeanOfBatch, 'batch'), (NeverTrained, 'gradients'), (FrozenTable, 'gradients'), (NanGradient, 'gradients'),
          (ForgetsState, 'padding|batch|save'), (HiddenWeight, 'save and load'), (WrongTable, 'shapes'), (InfiniteScore, 'shapes'), (LearnsNothing, 'after 300 steps')]

def test_the_model_that_the_faults_change_is_sound(): check_model(Sums)

@pytest.mark.parametrize('cls, check', FAULTS, ids=lambda v: getattr(v, '__name__', None))
def test_faults_are_caught(cls, check):
    with pytest.raises(AssertionError, match=f'^({cls.__name__}: )?({check})'): check_model(cls)

def test_lengths_that_ignore_the_last_item_are_named():
    with pytest.raises(AssertionError, match=re.escape('[1, 2, 3]')): check_model(ShortRowsAlike)

def test_bidirectional_models_may_look_ahead():
    both = type('Both', (LooksAhead,), dict(causal=False))
    assert check_model(both)['causal'] == 'ok'

def test_check_leaves_the_model_as_it_came():
    reseed(0); model = SASRec(20, **SMALL); before = {k: v.clone() for k, v in model.state_dict().items()}
    check_model(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

def sasrec(seed=0, n_items=60, **kw):
    "SASRec with weights far from zero, so that differences would show"
    reseed(seed); m = SASRec(n_items, **{**SMALL, 'max_len': 200, 'init_std': .3, **kw}).eval()
    return m

def rows(lengths, n_items=60, width=None, seed=1):
    g = torch.Generator().manual_seed(seed); n = torch.tensor(lengths)
    items = torch.randint(1, n_items + 1, (len(n), width or max(lengths)), generator=g)
    return Batch(items * (torch.arange(items.shape[1]) < n[:, None]), length=n)

LONG = [dict(), dict(norm='post'), dict(norm='query'), dict(positions='start'), dict(positions='none')]

@pytest.mark.parametrize('kw', LONG, ids=str)
@torch.no_grad()
def test_alone_in_a_batch_and_padded_alike(kw):
    m, b = sasrec(**kw), rows([1, 2, 10, 49, 50, 51, 199, 200])
    s = m.scores(b)
    for r, n in enumerate(b.length.tolist()):
        for width in {n, min(200, n + 1), min(200, n + 70), 200}:
            one = m.scores(Batch(F.pad(b.items[r:r + 1, :n], (0, width - n))))
            assert torch.allclose(one, s[r:r + 1], atol=2e-4, rtol=1e-4)
    assert (s.std(1) > .1).all() and (s[0] - s[1]).abs().max() > .1

@pytest.mark.parametrize('kw', LONG, ids=str)
@torch.no_grad()
def test_no_position_sees_a_later_item(kw):
    m, b = sasrec(**kw), rows([200, 150, 3])
    h = m(b).h
    for j in (1, 2, 100, 149, 199):
        other = b.items.clone(); other[:, j] = torch.where(other[:, j] > 0, other[:, j] % 60 + 1, 0)
        new = m(Batch(other)).h
        for r, n in enumerate(b.length.tolist()):
            assert torch.allclose(new[r, :min(j, n)], h[r, :min(j, n)], atol=1e-4)
            if j < n: assert (new[r, j] - h[r, j]).abs().max() > 1e-3

@torch.no_grad()
def test_order_matters_with_positions_only():
    b = rows([9]); turned = Batch(torch.cat([b.items[:, :-1].flip(1), b.items[:, -1:]], 1))
    gap = {p: (lambda m: (m.scores(b) - m.scores(turned)).abs().max())(sasrec(positions=p, n_blocks=1)) for p in ('end', 'start', 'none')}
    assert gap['none'] < 1e-4 < .1 < min(gap['end'], gap['start'])

@torch.no_grad()
def test_positions_from_the_end_or_the_start():
    "The same items one place further: the last position is the same from the end, another from the start"
    for p, same in (('end', True), ('start', False)):
        m = sasrec(positions=p, n_blocks=1); b = rows([2])
        x, y = m.embed(m.table(), b), m.embed(m.table(), Batch(torch.cat([b.items[:, :1], b.items], 1)))
        assert torch.allclose(x[:, -1], y[:, -1]) == same

@torch.no_grad()
def test_an_empty_history_is_finite():
    for kw in LONG: assert sasrec(**kw).scores(Batch(torch.zeros(2, 5, dtype=torch.long)))[:, 1:].isfinite().all()

@torch.no_grad()
@pytest.mark.parametrize('norm', ['pre', 'post', 'query'])
def test_a_window_that_is_too_long_is_refused(norm):
    with pytest.raises(ValueError, match='longer than max_len'): SASRec(9, **{**SMALL, 'norm': norm})(rows([13], 9))

@pytest.mark.parametrize('kw', [dict(), dict(n_items=3533, max_len=50, d_inner=256, norm='post', positions='start')], ids=['small', 'hybrid.md 1.4'])
def test_parameter_count(kw):
    kw = {**dict(n_items=70, d_model=64, n_blocks=2, n_heads=2, max_len=30, d_inner=None, norm='pre', positions='end'), **kw}
    V, d, f = kw['n_items'] + 1, kw['d_model'], kw['d_inner'] or kw['d_model']
    block = 4 * (d * d + d) + 2 * d * f + f + d + 2 * 2 * d
    want = V * d + kw['max_len'] * d + kw['n_blocks'] * block + (2 * d if kw['norm'] != 'post' else 0)
    count = sum(p.numel() for p in SASRec(**kw).parameters())
    assert count == want and (kw['max_len'] != 50 or count == 329_344)

def test_initial_weights():
    reseed(0); m = SASRec(2000, d_model=64, init_std=.02)
    for name, p in m.named_parameters():
        if 'norm' in name: assert (p == (1. if name.endswith('weight') else 0.)).all()
        elif name.endswith('bias'): assert not p.any()
        else: assert abs(p.std() / .0176 - 1) < .1 and p.abs().max() <= .04     # a normal cut at two deviations
    assert not m.item.weight[0].any() and m.item.weight[1:].any(1).all()
    b = rows([5, 9], 2000)
    assert abs(F.cross_entropy(m.eval().scores(b)[:, 1:], torch.tensor([3, 4])) - math.log(2000)) < .3   # near uniform

def test_dropout_draws_from_the_thread():
    m, b = sasrec(dropout=.3, attn_dropout=.2).train(), rows([20, 3])
    def h(*key):
        with drawing(*key): return m(b).h
    assert torch.equal(h(0), h(0)) and not torch.equal(h(0), h(1))

@pytest.mark.parametrize('kw, message', [(dict(positions='ende'), "did you mean 'end'"), (dict(norm='prenorm'), 'norm'), (dict(activation='rellu'), "'relu'"),
                                         (dict(d_model=15), 'multiple of n_heads'), (dict(dropout=1.), 'dropout'), (dict(dropout=-.1), 'dropout')])
def test_impossible_settings(kw, message):
    with pytest.raises(ValueError, match=message): SASRec(9, **{**SMALL, **kw})

@pytest.fixture
def registry(monkeypatch):
    "MODELS is put back after the test"
    before = dict(MODELS); yield MODELS
    MODELS.clear(); MODELS.update(before)

def test_create_by_name():
    m = create('SASRec', 9, d_model=8, n_heads=1)
    assert type(m) is SASRec and m.item.weight.shape == (10, 8) and create('sasrec', 9).d_model == 64
    with pytest.raises(ValueError, match="did you mean 'sasrec'"): create('sasrek', 9)
    with pytest.raises(TypeError, match="did you mean 'n_heads'"): create('sasrec', 9, n_head=2)
    with pytest.raises(ValueError, match='at least 1'): create('sasrec', 0)
    assert {'sasrec', 'popularity', 'markov', 'cooccurrence'} <= set(MODELS)

def test_settings_are_the_constructor():
    s = settings(SASRec)
    assert s['d_model'] == 64 and s['dropout'] == .2 and 'n_items' not in s and 'self' not in s

def test_a_variant_has_the_settings_of_its_class(registry):
    @register_model
    def wide_sasrec(n_items, d_model=32, gap=1, **kw): return SASRec(n_items, d_model, **kw)
    wide_sasrec.of = SASRec
    assert model_class('wide-SASRec') is wide_sasrec
    assert settings(wide_sasrec) == {**settings(SASRec), 'd_model': 32, 'gap': 1}
    m = create('wide_sasrec', 9, n_heads=4, dropout=0.)
    assert m.d_model == 32 and m.blocks[0].att.n_heads == 4
    with pytest.raises(TypeError, match="did you mean 'n_heads'"): create('wide_sasrec', 9, n_haeds=1)

def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match='registered already'): register_model(type('SASRec', (SASRec,), dict(__module__='elsewhere')))
    assert MODELS['sasrec'] is SASRec and register_model(SASRec) is SASRec      # the same module may, as a rerun cell does

def test_from_data():
    data = load(pd.DataFrame(dict(user=[1] * 4 + [2] * 3, item=[1, 2, 3, 4, 2, 3, 1], timestamp=np.arange(7) + 10**9)))
    m = SASRec.from_data(data, d_model=8)
    assert m.n_items == 4 and m.d_model == 8
    assert MODELS['popularity'].from_data(data).pop.tolist() == [0, 1, 2, 0, 0]

def test_predict_names_unseen_items_best_first():
    m, b = sasrec(), rows([1, 5, 40, 200])
    p, s = m.predict(b, 10), m.scores(b).detach()
    assert p.shape == (4, 10) and (p >= 0).all() and (p <= 60).all()
    for r in range(4):
        seen = set(b.items[r].tolist()); want = [i for i in s[r].argsort(descending=True).tolist() if i and i not in seen]
        assert [i for i in p[r].tolist() if i] == want[:10]             # then zeros, where nothing is left

def test_predict_never_names_a_seen_item():
    "Where fewer than k are unseen, the rest may be 0 (nobody), never something of the window"
    m, b = sasrec(n_items=6), Batch(torch.tensor([[1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]))
    p = m.predict(b, 4)
    assert not set(p[0].tolist()) & {1, 2, 3, 4, 5} and 6 in p[0] and not set(p[1].tolist()) & {0, 1}

def test_predict_more_than_there_are(): assert sasrec(n_items=6).predict(Batch(torch.tensor([[1, 2]])), 10).shape == (1, 6)

def test_predict_has_no_dropout():
    "After training a model is in training mode: recommendations must not be drawn by lot"
    m, b = sasrec(dropout=.5).train(), rows([5, 9])
    assert torch.equal(m.predict(b), sasrec(dropout=.5).predict(b)) and m.training

@torch.no_grad()
def test_scores_of_some_items_are_those_of_all():
    m, b = sasrec(), rows([3, 8, 8])
    out = m(b); h, E = b.at_last(out.h), out.E
    all, some = m.score(h, E), torch.tensor([7, 1, 60])
    assert torch.allclose(m.score(h, E, items=some), all[:, some], atol=1e-5)
    each = torch.tensor([[1, 2], [60, 60], [5, 9]])
    assert torch.allclose(m.score(h, E, items=each), all.gather(1, each), atol=1e-5)
    every = m.score(out.h, E)
    assert torch.allclose(m.score(out.h, E, items=some), every[..., some], atol=1e-5)
    deep = torch.randint(1, 61, (3, 8, 4))
    assert torch.allclose(m.score(out.h, E, items=deep), every.gather(2, deep), atol=1e-5)

@torch.no_grad()
def test_a_given_table_is_used():
    m, b = sasrec(), rows([3, 8])
    assert torch.equal(m.scores(b, m.table()), m.scores(b))
    E = m.table().roll(1, 1)
    assert m(b, E).E is E and not torch.allclose(m.scores(b, E), m.scores(b), atol=1e-2)
