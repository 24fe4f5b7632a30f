"""Faults on purpose: is a run that was killed, starved of disk or damaged still the run that nobody disturbed?

    python benchmarks/faults.py kills --kills 100 --seed 0 --out kills.json
    python benchmarks/faults.py flips | truncations | full | two | rank

A run here is `experiment.run` of a small SASRec on MovieLens 100K (where SEQREC_DATA has it; else on generated data of that size), with
validation, early stopping and a test. `kills` kills it with SIGKILL at seeded random moments, resumes it, and compares the sha256 of weights,
optimizer, best weights and ranks, and all of history.jsonl and metrics.json but times, with the undisturbed run. The killed process announces its
phases through a pipe; the last line in the pipe says in which phase it died. `flips` and `truncations` damage every file of a finished run,
`full` takes the disk away (RLIMIT_FSIZE, and a tmpfs of a few hundred KB where namespaces are allowed), `two` starts two
processes in one directory, `rank` kills one of two processes of a torchrun job. Each has a twin: the same without the guard.
What SIGKILL cannot show is a power cut: the page cache survives the process. Runs are forked from a process that has torch imported.
"""
import argparse, ctypes, hashlib, io, json, os, random, resource, select, shutil, signal, subprocess, sys, tempfile, time, traceback, warnings
from collections import Counter
from pathlib import Path
os.environ['OMP_NUM_THREADS'] = '1'
import numpy as np, torch
from safetensors.torch import load_file
from seqrec_nb import callbacks, checkpoint, experiment, files, runs
from seqrec_nb.checkpoint import CheckpointError, beside, load
from seqrec_nb.device import describe
from seqrec_nb.files import Locked, dumps, sha256
from seqrec_nb.train import Callback

SETTINGS = dict(model='sasrec', epochs=6, patience=2, lr=5e-3, batch_size=32, max_len=50, d_model=16, n_blocks=1, n_heads=2, dropout=.3,
                save_every=.2, threads=1, device='cpu', seed=7)
DONE, REFUSED, LOCKED, DISK, FAILED = 0, 3, 5, 6, 1
PHASES = ('start', 'step', 'save last', 'save best', 'evaluation', 'epoch end', 'after the last step', 'test', 'report')
TIMED = ('seconds', 'targets_per_s', 'memory_mb', 'timings', 'mtime', 'commit', 'saved')


# ---- the run, in a child ----

class Announcer(Callback):
    "Writes every change of phase into a pipe, and brings a fault about"
    def __init__(self, fd, fault): self.fd, self.fault, self.base = fd, fault or {}, 'start'
    def say(self, phase): os.write(self.fd, f'{phase}\t{time.monotonic()}\n'.encode())
    def now(self, phase): self.base = phase; self.say(phase)
    def on_fit_start(self, t):
        if self.fault.get('kind') == 'forget': t.load = lambda tensors, state: forgetful(t, tensors, state)
        for c in t.callbacks:
            if hasattr(c, 'on_save_error'): c.on_save_error = self.fault.get('mode', 'stop')
    def on_epoch_start(self, t): self.now('step')
    def on_step_end(self, t):
        self.now('step')
        if self.fault.get('kind') == 'fsize':
            if t.step == self.fault['step']: limit(self.fault['size'])
            if t.step == self.fault.get('until'): limit(resource.RLIM_INFINITY)
    def on_epoch_end(self, t): self.now('epoch end')
    def on_fit_end(self, t): self.now('after the last step')
    def wrap(self, module, name, phase):
        "Announce `phase` while a function runs, and what was before when it returns"
        call = getattr(module, name)
        def announced(*a, **k):
            self.say(phase(*a) if callable(phase) else phase)
            try: return call(*a, **k)
            finally: self.say('epoch end' if phase == 'evaluation' else 'report' if phase == 'test' else self.base)
        setattr(module, name, announced)

def forgetful(t, tensors, state):
    "What many loops do: the weights and the epoch come back, the counters of the random draws do not"
    type(t).load(t, tensors, state)
    t.step = 0

def limit(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def child(out, fd, settings, fault):
    "Train in this process; its exit code"
    sys.stdout = sys.stderr = log = io.StringIO()   # a file would be limited like all others
    warnings.simplefilter('always')
    a = Announcer(fd, fault)
    a.say('start')
    a.wrap(checkpoint, 'save', lambda folder, *_: f'save {Path(folder).name}')
    a.wrap(callbacks, 'evaluated', 'evaluation')
    a.wrap(experiment, 'test', 'test')
    try: experiment.run(experiment.Experiment(**settings), out, callbacks=[a]); return DONE
    except CheckpointError as e: print(type(e).__name__, e); return REFUSED
    except Locked as e: print(type(e).__name__, e); return LOCKED
    except OSError as e: traceback.print_exc(); return DISK
    except BaseException: traceback.print_exc(); return FAILED
    finally:
        limit(resource.RLIM_INFINITY)
        with open(f'{out}.log', 'a') as f: f.write(log.getvalue())

def start(out, settings, fault=None, gate=None):
    "(pid, pipe) of a forked run; with a `gate`, it waits until that pipe is closed"
    r, w = os.pipe()
    if pid := os.fork(): os.close(w); return pid, r
    try:
        os.close(r)
        if os.getpriority(os.PRIO_PROCESS, 0) < 0: os.nice(5)
        if gate: os.close(gate[1]); os.read(gate[0], 1)
        os._exit(child(out, w, settings, fault))
    finally: os._exit(FAILED)

def follow(pid, pipe, want=None):
    """(exit code, [(phase, time)]) of a run. `want`: (phase, n, delay) kills it so long after the n-th announcement of a phase,
    ('time', 0, delay) so long after its start."""
    text, told, deadline = b'', [], time.monotonic() + want[2] if want and want[0] == 'time' else None
    left = want[1] if want else 0
    while True:
        wait = None if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([pipe], [], [], wait)[0]: os.kill(pid, signal.SIGKILL); deadline = None; continue
        if not (new := os.read(pipe, 65536)): break
        *lines, text = (text + new).split(b'\n')
        for line in lines:
            phase, at = line.decode().split('\t')
            told.append((phase, float(at)))
            if want and phase.startswith(want[0]):
                left -= 1
                if not left: deadline = time.monotonic() + want[2]
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told

def train(out, settings, want=None, fault=None): return follow(*start(out, settings, fault), want)


# ---- what a run must be ----

def untimed(x):
    "JSON without what a clock or another checkout puts into it"
    if isinstance(x, dict): return {k: untimed(v) for k, v in x.items() if k not in TIMED}
    return [untimed(v) for v in x] if isinstance(x, list) else x

def result(out) -> dict:
    "Everything of a finished run that must not depend on what happened to it"
    read = lambda f: untimed(json.loads((out/f).read_text()))
    bits = {f: sha256(out/f) for f in ('last/model.safetensors', 'last/optim.safetensors', 'best/model.safetensors', 'ranks.npz')}
    text = {f: read(f) for f in ('last/state.json', 'best/state.json', 'metrics.json')}
    return {**bits, **text, 'history.jsonl': [untimed(r) for r in callbacks.read_history(out/'history.jsonl')]}

def differing(out, good) -> list:
    "What differs from the undisturbed run"
    try: found = result(out)
    except (OSError, ValueError) as e: return [f'{type(e).__name__}: {e}']
    return [k for k in good if found[k] != good[k]]

def undisturbed(a, **kw):
    "(run directory, result, announcements, settings) of the run that nobody disturbs"
    settings = {**SETTINGS, 'data': data_of(a), **kw}
    out = a.work/'undisturbed'
    code, told = train(out, settings)
    assert code == DONE, Path(f'{out}.log').read_text()
    return out, result(out), told, settings

def data_of(a):
    "MovieLens 100K, or generated data of its size"
    if (Path(os.environ.get('SEQREC_DATA', ''))/'ml-100k').is_dir() and not a.generated: return 'ml-100k'
    from seqrec_nb.data.planted import synthetic
    d, path = synthetic(943, 1700, longest=400, seed=a.seed), a.work/'generated.csv'
    s = d.seqs
    rows = np.stack([np.repeat(np.arange(len(s.offsets) - 1), np.diff(s.offsets)), s.items, s.times], 1)
    np.savetxt(path, rows, '%d', ',', header='user,item,timestamp', comments='')
    return str(path)


# ---- kills ----

def lasted(told):
    "phase -> (how often, mean seconds), and the seconds of the whole run"
    spans = [(p, b - a) for (p, a), (_, b) in zip(told, told[1:])]
    each = {p: [s for q, s in spans if q == p] for p in dict(told)}
    return {p: (len(s), sum(s) / len(s)) for p, s in each.items() if s}, told[-1][1] - told[0][1]

def moment(rng, phase, known, whole, early=1.):
    "When to kill: a random time, or a random moment of a random visit to a phase"
    if phase == 'time': return 'time', 0, rng.uniform(0, whole * early)
    n, mean = known[phase]
    return phase, rng.randint(1, max(1, round(n * early))), rng.uniform(0, mean)

def kills(a):
    "Kill at random moments and compare: runs that are killed once, and runs that are killed again and again"
    rng = random.Random(a.seed)
    whole, good, told, settings = undisturbed(a)
    known, seconds = lasted(told)
    say(f'the undisturbed run: {seconds:.1f} s, ' + ', '.join(f'{n} x {p} of {1000 * s:.1f} ms' for p, (n, s) in known.items()))
    wanted = ('step', 'save last', 'evaluation', 'after the last step', 'test', 'save best', 'time')
    once = [[wanted[k % len(wanted)]] for k in range(a.kills // 2)]
    again = [[rng.choice(wanted[:6] + ('time',) * 3) for _ in range(5)] for _ in range(-(-(a.kills - len(once)) // 5))]
    found = []
    for k, plan in enumerate(once + again): found.append(killed(a, rng, k, plan, known, seconds, settings, good))
    while sum(len(f['kills']) for f in found) < a.kills:      # some runs were quicker than their kill
        found.append(killed(a, rng, len(found), [rng.choice(wanted)], known, seconds, settings, good))
    twin = [killed(a, rng, f'twin{k}', ['step'], known, seconds, settings, good, dict(kind='forget')) for k in range(a.twins)]
    fell = Counter(phase for f in found for phase in f['kills'])
    same = [f for f in found if not f['differs']]
    return dict(kills=sum(fell.values()), in_phase={p: fell[p] for p in PHASES if fell[p]}, missed=sum(f['missed'] for f in found),
                kills_bit_identical=sum(len(f['kills']) for f in same), runs=len(found), runs_bit_identical=len(same),
                runs_killed_once=sum(len(f['kills']) == 1 for f in found), runs_killed_again=sum(len(f['kills']) > 1 for f in found),
                differing=[f for f in found if f['differs']], undisturbed_s=round(seconds, 1), compared=list(good),
                twin=dict(what='resumed with the weights but without the counters of the random draws', runs=len(twin),
                          kills=sum(len(f['kills']) for f in twin), bit_identical=sum(not f['differs'] for f in twin)))

def killed(a, rng, k, plan, known, seconds, settings, good, fault=None):
    "One run with the kills of a plan, resumed until it is finished"
    out, fell, missed = a.work/f'run{k}', [], 0
    for phase in plan:
        early = .9 if phase in ('save best', 'save last', 'step', 'evaluation') else 1
        code, told = train(out, settings, moment(rng, phase, known, seconds, early if len(plan) == 1 else .35), fault if fell else None)
        if code == -signal.SIGKILL: fell.append(told[-1][0] if told else 'start')
        else: missed += 1; break
    code, _ = train(out, settings, fault=fault)
    differs = differing(out, good) if code == DONE else [f'exit code {code}']
    if fault and not fell: differs = ['was not killed']
    say(f'run {k}: wanted {", ".join(plan)}; killed in {", ".join(fell) or "nothing"}; {"differs: " + str(differs) if differs else "identical"}')
    if not differs or fault: shutil.rmtree(out); os.unlink(f'{out}.log')
    return dict(run=k, kills=fell, missed=missed, differs=differs)


# ---- damage ----

def checkpoint_files(out): return [p for f in ('last', 'best') for p in sorted((out/f).iterdir())]
def run_files(out): return [p for f in ('metrics.json', 'ranks.npz', 'experiment.json', 'history.jsonl', 'MANIFEST.json') if (p := out/f).exists()]

def told_by_load(path, out) -> str:
    "What `load` makes of a checkpoint with this damaged file: 'fallback', 'error' or 'silent'"
    how = 'error'
    if path.parent.name == 'last':          # a run resumes from the checkpoint before it
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            found = load(path.parent)
        how = 'fallback' if found.path == beside(path.parent, 'previous') and any(path.name in str(w.message) for w in seen) else 'silent'
    try: load(path.parent, fallback=False)
    except CheckpointError as e: return how if path.name in str(e) else 'silent'
    return 'silent'

def told_by_format(path, good: bytes) -> str:
    "What a reader without the manifest makes of it: 'error', 'wrong' content without a word, or the 'same' content"
    try: a, b = plain_content(path, path.read_bytes()), plain_content(path, good)
    except Exception: return 'error'
    same = a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) if isinstance(a[k], np.ndarray) else a[k] == b[k] for k in a)
    return 'same' if same else 'wrong'

def plain_content(path, data):
    "name -> bytes or value, as safetensors, NumPy and json alone read it"
    if path.suffix == '.safetensors':
        with tempfile.NamedTemporaryFile() as f:
            Path(f.name).write_bytes(data)
            return {k: t.numpy().tobytes() + str(t.dtype).encode() + str(tuple(t.shape)).encode() for k, t in load_file(f.name).items()}
    if path.suffix == '.npz': return {k: v.tobytes() for k, v in np.load(io.BytesIO(data)).items()}
    return dict(enumerate(json.loads(l) for l in data.decode().splitlines())) if path.suffix == '.jsonl' else json.loads(data)

def told_by_check(out) -> str:
    "What `seqrec runs --check` says: 'gap' or 'silent'"
    try: return 'gap' if any(c.ok is False for c in runs.check_run(out)) else 'silent'
    except Exception as e: return f'crash {type(e).__name__}'

def flipped(data, bit): return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]

def damage(out, path, versions, told) -> dict:
    "Put every version in the place of a file: how often the guard says what, and how often the format alone"
    good, guard, alone = path.read_bytes(), Counter(), Counter()
    for bad in versions(good):
        path.write_bytes(bad)
        guard[told(path)] += 1
        alone[told_by_format(path, good)] += 1
    path.write_bytes(good)
    return dict(file=str(path.relative_to(out)), bytes=len(good), tried=sum(guard.values()), guard=dict(guard), format_alone=dict(alone))

def damages(a, versions) -> dict:
    "Both kinds of files of a finished run, damaged in the same ways"
    out, good, *_ = undisturbed(a)
    assert told_by_check(out) == 'silent', 'the undisturbed run has a gap of its own'
    saved = [damage(out, p, versions, lambda path: told_by_load(path, out)) for p in checkpoint_files(out)]
    rest = [damage(out, p, versions, lambda path: told_by_check(out)) for p in run_files(out)]
    assert not differing(out, good)
    count = lambda rows, of, key: sum(r[of].get(key, 0) for r in rows)
    return dict(checkpoints=dict(tried=sum(r['tried'] for r in saved), silent=count(saved, 'guard', 'silent'),
                                 twin_without_the_manifest=dict(wrong_without_a_word=count(saved, 'format_alone', 'wrong'))),
                run_files=dict(tried=sum(r['tried'] for r in rest), silent=count(rest, 'guard', 'silent'),
                               twin_read_alone=dict(wrong_without_a_word=count(rest, 'format_alone', 'wrong'))), files=saved + rest)

def flips(a):
    "Flip single bits of every file"
    rng = random.Random(a.seed)
    return damages(a, lambda good: (flipped(good, rng.randrange(8 * len(good))) for _ in range(a.flips)))

def truncations(a):
    "Cut every file to many sizes"
    def cut(good):
        sizes = {0, 1, len(good) - 1, *np.linspace(0, len(good) - 1, a.sizes).astype(int).tolist()}
        return (good[:n] for n in sorted(sizes))
    return damages(a, cut)


# ---- a full disk ----

def full(a):
    "Take the disk away in the middle of a run; give it back and resume"
    rng = random.Random(a.seed)
    whole, good, told, settings = undisturbed(a, epochs=3, patience=0)
    steps, big = json.loads((whole/'last'/'state.json').read_text())['trainer']['step'], max(p.stat().st_size for p in (whole/'last').iterdir())
    sizes = [0, 1, 100, big - 1, big, big + 1, 2 * big] + [int(big ** rng.uniform(.3, 1.02)) for _ in range(max(a.limits, a.warns) - 7)]
    cases = [starved(a, k, settings, good, dict(kind='fsize', size=n, step=rng.randrange(1, steps - 8))) for k, n in enumerate(sizes[:a.limits])]
    warned = []
    for k, n in enumerate(sizes[:a.warns]):
        s = rng.randrange(1, steps - 8)
        warned.append(starved(a, f'w{k}', settings, good, dict(kind='fsize', size=n, step=s, mode='warn',
                                                              until=None if k % 3 == 2 else rng.randrange(s + 1, steps))))
    tmpfs = [in_namespace(a, kb, settings, good) for kb in np.linspace(big / 1100, 9 * big / 1024, a.mounts).astype(int).tolist()]
    return dict(fsize=counted(cases), fsize_warn=counted(warned), tmpfs=counted(tmpfs), largest_file=big, cases=cases + warned + tmpfs)

def counted(cases):
    "How the cases ended"
    ran = [c for c in cases if 'skipped' not in c]
    return dict(cases=len(ran), ended=dict(Counter(c['ended'] for c in ran)), sound_checkpoint_kept=sum(c['sound'] for c in ran),
                identical_after_resume=sum(not c['differs'] for c in ran), skipped=[c['skipped'] for c in cases if 'skipped' in c][:1])

ENDED = {DONE: 'finished', REFUSED: 'CheckpointError', DISK: 'OSError', FAILED: 'another error', -signal.SIGKILL: 'killed'}

def starved(a, k, settings, good, fault, more=lambda: None):
    "One run on a disk that fills up, and its resumption on one that does not"
    out = a.work/f'full{k}'
    code, told = train(out, settings, fault=fault)
    why = Path(f'{out}.log').read_text().strip().splitlines()[-1:] if code else []
    try: step, sound = load(out/'last').state['trainer']['step'], True
    except CheckpointError as e: step, sound = None, not checkpoint.exists(out/'last')      # nothing was saved yet
    more()
    again, _ = train(out, settings)
    differs = differing(out, good) if again == DONE else [f'exit code {again}']
    case = dict(**fault, ended=ENDED.get(code, code), why=[w.replace(str(a.work), '…')[:150] for w in why], checkpoint_of_step=step, sound=sound,
                differs=differs, warned=Path(f'{out}.log').read_text().count('not saved, the newest'))
    say(str(case))
    if not differs: shutil.rmtree(out); os.unlink(f'{out}.log')
    return case

def in_namespace(a, kb, settings, good) -> dict:
    "The same on a tmpfs of so many KB, mounted where only this child sees it, and enlarged before the resumption"
    r, w = os.pipe()
    if pid := os.fork():
        os.close(w)
        with os.fdopen(r) as f: text = f.read()
        os.waitpid(pid, 0)
        return json.loads(text or '{"skipped": "the child died"}')
    try:
        found, libc, uid, gid, there = None, ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid(), a.work/'tmpfs'
        there.mkdir(exist_ok=True)
        def mount(flags, size):
            if libc.mount(b'none', str(there).encode(), b'tmpfs', flags, f'size={size}k'.encode()): raise OSError(ctypes.get_errno(), 'mount')
        try:
            if libc.unshare(0x10020000): raise OSError(ctypes.get_errno(), 'unshare')       # CLONE_NEWUSER | CLONE_NEWNS
            Path('/proc/self/setgroups').write_text('deny')
            for name, n in (('uid_map', uid), ('gid_map', gid)): Path(f'/proc/self/{name}').write_text(f'0 {n} 1')
            mount(0, kb)
        except OSError as e: found = dict(skipped=f'no namespace here: {e}')
        if not found:
            inside = argparse.Namespace(**{**vars(a), 'work': there})
            found = starved(inside, 0, settings, good, dict(kind='tmpfs', size=kb * 1024), more=lambda: mount(32, 1 << 20))   # MS_REMOUNT
        os.write(w, json.dumps(found).encode())
    except BaseException: traceback.print_exc()
    finally: os._exit(0)


# ---- two processes ----

def two(a):
    "Two processes start in one directory at the same instant"
    settings = dict(epochs=2, patience=0)
    whole, good, _, settings = undisturbed(a, **settings)
    races = [race(a, k, settings, good) for k in range(a.races)]
    files.take = lambda file: None
    twin = [race(a, f'twin{k}', settings, good) for k in range(min(a.races, 5))]
    return dict(races=len(races), one_worked=sum(sorted(r['codes']) == [DONE, LOCKED] for r in races), holder_named=sum(r['named'] for r in races),
                identical=sum(not r['differs'] for r in races),
                twin=dict(what='without the lock', races=len(twin), one_worked=sum(sorted(r['codes']) == [DONE, LOCKED] for r in twin),
                          both_trained=sum(LOCKED not in r['codes'] for r in twin), codes=[r['codes'] for r in twin]))

def race(a, k, settings, good):
    "One race of two"
    out, gate = a.work/f'race{k}', os.pipe()
    pair = [start(out, settings, gate=gate) for _ in range(2)]
    time.sleep(.1)
    for fd in gate: os.close(fd)
    codes = [follow(*p)[0] for p in pair]
    log = Path(f'{out}.log').read_text()
    named = sum(f'in use by process {pid} on {os.uname().nodename} since' in log for pid, _ in pair) == 1
    r = dict(codes=codes, named=named, differs=differing(out, good))
    say(str(r))
    shutil.rmtree(out); os.unlink(f'{out}.log')
    return r


# ---- one of two ranks ----

def command(a, out, settings, processes):
    "A training from the command line, by torchrun where it is of several processes"
    flags = [f'--{k}={v}' for k, v in settings.items() if k not in ('model', 'data')]
    start = [sys.executable, '-W', 'always']
    if processes > 1: start += ['-m', 'torch.distributed.run', '--nproc-per-node', str(processes), '--master-port', str(random.randint(20_000, 60_000))]
    log = open(f'{out}.log', 'a')
    return subprocess.Popen([*start, '-m', 'seqrec_nb.cli', 'train', settings['model'], settings['data'], *flags, '--out', str(out)],
                            stdout=log, stderr=log, cwd=a.work)

def workers(parent) -> dict:
    "rank -> pid of the processes that torchrun has started"
    pids = Path(f'/proc/{parent}/task/{parent}/children').read_text().split()
    names = {pid: dict(x.split('=', 1) for x in Path(f'/proc/{pid}/environ').read_text().split('\0') if '=' in x) for pid in pids}
    return {int(e['RANK']): int(pid) for pid, e in names.items() if 'RANK' in e}

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(') ', 1)[1][0] not in 'ZX'
    except OSError: return False

def lose(a, out, settings, victim, step):
    "Start two ranks, kill one when `last/` has reached a step; what became of the job"
    job = command(a, out, settings, 2)
    saved = lambda: load(out/'last').state['trainer']['step'] if checkpoint.exists(out/'last') else 0
    while job.poll() is None and not (checkpoint.exists(out/'last') and saved() >= step): time.sleep(.05)
    if job.poll() is not None: return dict(killed=None, code=job.returncode)
    pids = workers(job.pid)
    os.kill(pids[victim], signal.SIGKILL)
    began = time.monotonic()
    try: code = job.wait(240)
    except subprocess.TimeoutExpired: job.kill(); code = 'did not stop'
    return dict(killed=victim, code=code, stopped_after_s=round(time.monotonic() - began, 1), left_alive=sum(map(alive, pids.values())), checkpoint_of_step=saved())

def rank(a):
    "Kill one of the two ranks of a torchrun job; go on with one process, and with two"
    rng, settings = random.Random(a.seed), {**SETTINGS, 'data': data_of(a), 'epochs': 3, 'patience': 0}
    warnings.simplefilter('ignore')
    two = a.work/'two-undisturbed'
    assert command(a, two, settings, 2).wait() == 0, Path(f'{two}.log').read_text()
    good, cases = result(two), []
    steps = json.loads((two/'last'/'state.json').read_text())['trainer']['step']
    for k in range(a.ranks):
        out, again = a.work/f'rank{k}', 2 if k % 4 == 3 else 1
        case = lose(a, out, settings, k % 2, rng.randrange(1, steps - 10))
        case |= dict(resumed_by=again, resume_code=command(a, out, settings, again).wait())
        log = Path(f'{out}.log').read_text()
        case |= dict(said='not to the same bits: processes: 2 then, 1 now' in log, differs=differing(out, good))
        if case['resume_code'] == 0:
            m = [json.loads((x/'metrics.json').read_text())['test_metrics']['NDCG@10'] for x in (out, two)]
            case['test_NDCG@10_off_by'] = abs(m[0] - m[1])
        say(str(case)); cases.append(case)
    one, both = ([c for c in cases if c['resumed_by'] == n] for n in (1, 2))
    return dict(kills=sum(c['killed'] is not None for c in cases), job_stopped=sum(c['code'] not in (0, 'did not stop') and not c.get('left_alive') for c in cases),
                resumed_by_one=dict(runs=len(one), finished=sum(c['resume_code'] == 0 for c in one), said_so=sum(c['said'] for c in one)),
                resumed_by_two=dict(runs=len(both), finished=sum(c['resume_code'] == 0 for c in both), bit_identical=sum(not c['differs'] for c in both)),
                cases=cases)


# ---- the command ----

def say(text): print(text, file=sys.stderr, flush=True)

COMMANDS = dict(kills=kills, flips=flips, truncations=truncations, full=full, two=two, rank=rank)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('command', choices=COMMANDS)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='also write the JSON here')
    p.add_argument('--work', type=Path, help='an empty folder for the runs (default: a temporary one)')
    p.add_argument('--generated', action='store_true', help='generated data even where MovieLens 100K is there')
    p.add_argument('--kills', type=int, default=100)
    p.add_argument('--twins', type=int, default=5, help='runs without the guard')
    p.add_argument('--flips', type=int, default=50, help='of every file')
    p.add_argument('--sizes', type=int, default=64, help='to which every file is cut')
    p.add_argument('--limits', type=int, default=24, help='sizes of a file at which the disk is full')
    p.add_argument('--warns', type=int, default=12, help="the same with on_save_error='warn'")
    p.add_argument('--mounts', type=int, default=8, help='tmpfs of different sizes')
    p.add_argument('--races', type=int, default=10)
    p.add_argument('--ranks', type=int, default=6, help='kills of a rank')
    a = p.parse_args(argv)
    a.work = Path(a.work or tempfile.mkdtemp(prefix='faults')).resolve()
    a.work.mkdir(parents=True, exist_ok=True)
    if any(a.work.iterdir()): p.error(f'{a.work} is not empty')
    torch.set_num_threads(1)
    try: os.nice(-5)   # the parent waits nearly always; it has to wake in time to kill
    except PermissionError: pass
    began = time.time()
    found = COMMANDS[a.command](a)
    text = dumps(dict(command=a.command, seed=a.seed, data=Path(data_of(a)).name, settings=SETTINGS, commit=experiment.commit(), environment=describe('cpu'),
                      seconds=round(time.time() - began), date=time.strftime('%F'), **found))
    print(text, end='')
    if a.out: a.out.write_text(text)

if __name__ == '__main__': main()
