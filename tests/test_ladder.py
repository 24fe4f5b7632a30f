"The ladder's first model has the faults it is there to show, and without them it is the library's."
import importlib.util, json, sys
import pytest, torch
from conftest import ROOT, needs_data
from torch.nn import functional as F
from seqrec_nb.core import Batch, reseed
from seqrec_nb.data import load, synthetic
from seqrec_nb.data.graph import item_graph
from seqrec_nb.models.hybrid import HybridSASRecGNN
from seqrec_nb.models.sasrec import SASRec
from seqrec_nb.models.base import MODELS, check_model

@pytest.fixture(scope='module')
def ladder():
    "The benchmark as a module; its model is registered for as long as this file is tested"
    spec = importlib.util.spec_from_file_location('ladder', ROOT/'benchmarks'/'ladder.py')
    sys.modules['ladder'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del MODELS['aspublished'], sys.modules['ladder']

@pytest.fixture(scope='module')
def graph(): return item_graph(synthetic(60), min_count=1)

def make(ladder, graph, **kw):
    reseed(0, 'ladder')
    return ladder.AsPublished(graph.n_items, graph, **kw).eval()

def rows(n_items, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = torch.tensor(lengths)
    items = torch.randint(1, n_items + 1, (len(n), int(n.max())), generator=g) * (torch.arange(int(n.max())) < n[:, None])
    return Batch(items, length=n)

def matters(model, n):
    "The places of a history of n items whose item matters to the scores"
    b = rows(model.n_items, [n]); many = b.items.repeat(n, 1); at = torch.arange(n)
    many[at, at] = many[at, at] % model.n_items + 1
    with torch.no_grad(): s = model.scores(Batch(many, length=b.length.expand(n))) - model.scores(b)
    return (s[:, 1:].abs().amax(1) > 1e-6).nonzero()[:, 0].tolist()

def by_the_book(model, b):
    "The original's arithmetic on the whole window, with its mask, read at its column: (B,D)"
    T, D, n = model.max_len, model.d_model, b.mask.sum(1)
    seq = torch.zeros(len(n), T, dtype=torch.long)
    for r, k in enumerate(n.tolist()): seq[r, T - k:] = b.items[r, :k]
    E = model.item.weight
    if model.gnn is not None:
        a = torch.where(n <= 10, .3, .5)[:, None, None]
        E = a * E + (1 - a) * F.linear(model.gnn(), model.project.weight, model.project.bias)      # a table for every row
        x = E[torch.arange(len(n))[:, None], seq]
    else: x = E[seq]
    x = x + model.position.weight
    mask = torch.ones(T, T).tril() * (seq > 0)[:, None]
    for block in model.blocks:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block.att.qkv(x).chunk(3, -1))
        w = (q @ k.transpose(2, 3) / (D // 2) ** .5).masked_fill(mask[:, None] == 0, -1e9).softmax(-1)
        x = block.norm1(x + block.att.out((w @ v).transpose(1, 2).flatten(2)))
        x = block.norm2(x + block.ffn.outer(F.relu(block.ffn.inner(x))))
    return x[torch.arange(len(n)), n - 1 if model.readout == 'published' else torch.full_like(n, T - 1)]

@pytest.mark.parametrize('kind', [{}, dict(readout='right'), dict(with_graph=False), dict(gnn_norm='weighted', readout='right')])
def test_what_is_computed_is_the_whole_window(ladder, graph, kind):
    model = make(ladder, graph, **kind)
    b = rows(graph.n_items, [1, 2, 9, 10, 11, 24, 25, 26, 27, 40, 49, 50])
    with torch.no_grad(): assert torch.allclose(b.at_last(model(b).h), by_the_book(model, b), atol=1e-5)

@pytest.mark.parametrize('with_graph', [True, False])
def test_published_readout_reads_the_wrong_place(ladder, graph, with_graph):
    model = make(ladder, graph, with_graph=with_graph)
    assert matters(model, 30) == [*range(10)]                       # column 29 of items in columns 20 … 49
    assert matters(model, 26) == [0, 1]
    assert matters(model, 50) == [*range(50)]
    for n in (1, 7, 25): assert matters(model, n) == [*range(n)]    # padding, which sees everything
    right = make(ladder, graph, with_graph=with_graph, readout='right')
    for n in (1, 25, 30, 50): assert matters(right, n) == [*range(n)]

@torch.no_grad()
def test_padding_is_what_is_read_of_short_histories(ladder, graph):
    "Padding's own vector matters where it is read; it sees a uniform bag, so with equal places the order does not matter"
    for readout, reads in (('published', {10: True, 25: True, 26: False, 50: False}), ('right', {10: False, 25: False})):
        model = make(ladder, graph, readout=readout); E = model.table(); other = E.clone(); other[0] += 1.
        for n, read in reads.items():
            b = rows(graph.n_items, [n])
            assert (not torch.equal(model.scores(b, E)[:, 1:], model.scores(b, other)[:, 1:])) == read
    model = make(ladder, graph)
    model.position.weight.copy_(model.position.weight[:1].expand_as(model.position.weight))
    model.blocks = model.blocks[1:]                                 # one block: the bag itself
    b = rows(graph.n_items, [20]); turned = Batch(b.items.flip(1), length=b.length)
    assert torch.allclose(model.scores(b), model.scores(turned), atol=1e-5)

def test_checks_find_the_fault(ladder, graph):
    of = lambda **kw: lambda n: ladder.AsPublished(n, graph, **kw)
    with pytest.raises(AssertionError, match='last item: .* of length .6, 7, 8, 9'): check_model(of(max_len=10), graph.n_items)
    with pytest.raises(AssertionError, match='padding'): check_model(of(), graph.n_items)     # all lengths of the check read it
    assert check_model(of(readout='right'), graph.n_items)['last item'] == 'ok'

@pytest.mark.parametrize('with_graph', [True, False])
def test_without_its_faults_it_is_the_library_s_model(ladder, graph, with_graph):
    "Equal weights, equal scores: positions from the end are the columns of a left-padded window"
    old = make(ladder, graph, with_graph=with_graph, readout='right', gnn_norm='weighted')
    kw = dict(norm='post', d_inner=256, max_len=50)
    new = HybridSASRecGNN(graph.n_items, graph, alpha_per='user', L_long=10**9, **kw) if with_graph else SASRec(graph.n_items, **kw)
    w = {k: v.flip(0) if k == 'position.weight' else v for k, v in old.state_dict().items()}
    new.load_state_dict(w); new.eval()
    b = rows(graph.n_items, [1, 5, 10, 11, 30, 50])
    with torch.no_grad(): assert torch.allclose(new.scores(b)[:, 1:], old.scores(b)[:, 1:], atol=1e-5)

def test_sizes_are_the_original_s(ladder):
    count = lambda m: sum(p.numel() for p in m.parameters())
    g = synthetic(60); g = item_graph(g, min_count=1)
    N, D = g.n_items, 64
    plain = D * (N + 1) + D * 50 + 2 * 49984
    assert count(make(ladder, g, with_graph=False)) == plain
    assert count(make(ladder, g)) == plain + D * (N + 1) + D * D + D
    assert plain - D * (N + 1) + D * 3534 == 329344

def test_no_history_is_long(ladder, graph):
    assert torch.allclose(make(ladder, graph).alpha(torch.tensor([1, 10, 11, 51, 500])), torch.tensor([.3, .3, .5, .5, .5]))

def test_shares(ladder):
    s = ladder.readout_shares(range(1, 61), 50)
    assert [s[k]['count'] for k in ('pad', 'stale', 'right')] == [25, 24, 11]
    assert ladder.readout_shares([1, 2], 1)['right']['count'] == 2
    assert ladder.prefixes([1, 3, 4]).tolist() == [1, 2, 1, 2, 3]

@needs_data
def test_shares_of_ml_1m(ladder):
    data = load('ml-1m', 'P-seed')
    n = ladder.prefixes(data.train.length); assert len(n) == 557170
    share = lambda n, L: {k: round(100 * v['share'], 1) for k, v in ladder.readout_shares(n, L).items()}
    assert share(n, 50) == dict(pad=24.5, stale=16.5, right=59.0) and share(n, 200) == dict(pad=63.6, stale=21.0, right=15.4)
    test = ladder.readout_shares(data.test.length, 50)
    assert (test['pad']['count'], test['stale']['count']) == (1434, 1271)

def test_each_rung_changes_what_it_says(ladder):
    r = ladder.rungs(); keys = [*r]
    changed = {b: {k for k in {*r[a].settings, *r[b].settings} if r[a].settings.get(k) != r[b].settings.get(k)}
               for a, b in zip(keys, keys[1:])}
    assert keys == ['0', '1', '2', '3', '4', '4b', '5']
    assert [changed[k] for k in keys[1:5]] == [{'readout'}, set(), {'gnn_norm'}, {'loss', 'negatives'}]
    assert r['3'].without_graph() == r['1'].without_graph()

def test_ladder_runs_restarts_and_reports(ladder, tmp_path, monkeypatch, capsys):
    log = synthetic(25)
    monkeypatch.setattr('seqrec_nb.record.load', lambda *a: log)
    command = ['--out', str(tmp_path), '--rungs', '0,1,2', '--seeds', '0', '--epochs', '1', '--no-graph', '--device', 'cpu']
    ladder.main(command); first = capsys.readouterr().out
    assert first.count(' is finished') == 0 and sorted(p.name for p in tmp_path.glob('*-s0')) == ['0-s0', '0-sasrec-s0', '1-s0', '1-sasrec-s0']
    found = json.loads((tmp_path/'ladder.json').read_text())
    r0, r1, r2 = found['rungs']
    assert r1['runs'] == r2['runs'] and (r1['side'], r2['side']) == ('unmasked', 'masked')
    m = json.loads((tmp_path/'1-s0'/'metrics.json').read_text())
    assert r1['runs'][0]['masked']['overall']['HR@10'] == pytest.approx(m['test_metrics']['HR@10'])
    assert r1['runs'][0]['unmasked']['overall']['HR@10'] == pytest.approx(m['test_metrics_unmasked']['HR@10'])
    worth = r2['fix']['overall']['HR@10']['difference']
    assert worth == pytest.approx(r1['mean']['masked']['overall']['HR@10'] - r1['mean']['unmasked']['overall']['HR@10'])
    gain = r0['graph']['unmasked']['overall']['HR@10']
    assert gain['difference'] == pytest.approx(r0['mean']['unmasked']['overall']['HR@10'] - r0['sasrec']['mean']['unmasked']['overall']['HR@10'])
    ladder.main(command); again = capsys.readouterr().out
    assert again.count(' is finished') == 4 and json.loads((tmp_path/'ladder.json').read_text()) == found
    ladder.main(['--table', '--out', str(tmp_path)])
    assert 'seen items masked' in capsys.readouterr().out
