"The house rules: pages, layers, package, docs, wheel, secrets. Nothing here trains a model."
import ast, json, os, re, runpy, shutil, subprocess, sys, sysconfig
from pathlib import Path
import pytest, yaml
from conftest import NBS, NOTEBOOKS, ROOT, needs_data
from execnb.nbio import nb2str
from nbdev.clean import clean_nb
from seqrec_nb.project import page_address, readme, settings

CFG = settings(ROOT)
LIB = CFG['lib_path']

def cells(nb): return json.loads((NBS/nb).read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def code_cells(nb): return [source(c) for c in cells(nb) if c['cell_type'] == 'code']
def prose(nb): return '\n\n'.join(source(c) for c in cells(nb) if c['cell_type'] == 'markdown')
def exported(text): return bool(re.match(r'#\|\s*export', text))
def code_lines(text): return [l for l in text.splitlines() if l.strip() and not l.strip().startswith('#')]
def parse(text): return ast.parse(re.sub(r'^\s*[!%].*$', '', text, flags=re.M))

def module_of(nb):
    "The module that a notebook exports, or None"
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(code_cells(nb)), flags=re.M)
    return found and found[1]

def project_copy(to, *names):
    "A copy of parts of the project, so that no test writes into the checkout"
    to.mkdir(exist_ok=True)
    ignore = shutil.ignore_patterns('__pycache__', '.*', 'build')
    for name in names:
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, to/name, ignore=ignore)
        else: shutil.copy2(ROOT/name, to/name)
    return to

def execute(*command, cwd, **env):
    "Run a command as from a fresh shell; fail with what it printed"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout

# ---- pages ----

def is_import(node):
    "An import, or the attempt at one"
    if isinstance(node, ast.Try): return all(map(is_import, node.body))
    return isinstance(node, (ast.Import, ast.ImportFrom))

def mixed(text):
    "Does a cell import and do something else? To make the docs, nbdev runs every cell that holds an import"
    tree = parse(text)
    imports = tree.body if exported(text) else ast.walk(tree)   # an exported function may import when called
    return any(map(is_import, imports)) and not all(map(is_import, tree.body))

def cell_faults(text):
    "Where one code cell leaves the house style"
    where = next(iter(code_lines(text)), text)[:60]
    if mixed(text): yield f'imports share a cell with other code: {where}'
    yield from (f'{len(l)} characters (at most 110): {l}' for l in text.splitlines() if len(l) > 110)
    if not exported(text): return
    size = len(code_lines(text))
    if size > 40: yield f'an exported cell of {size} lines (at most 40): {where}'
    for node in ast.walk(parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        length = len(code_lines('\n'.join(text.splitlines()[node.lineno - 1:node.end_lineno])))
        if length > 25: yield f'{node.name} has {length} lines (at most 25)'

def page_faults(nb):
    "Where a notebook leaves the house style"
    (first, second, *_), code, module = cells(nb), code_cells(nb), module_of(nb)
    lines = sum(len(code_lines(t)) for t in code)
    export = sum(len(code_lines(t)) for t in code if exported(t))
    words = len(prose(nb).split())
    if not re.fullmatch(r'# [^\n]+\n\n> [^\n]+\n?', source(first)):
        yield 'the first cell is `# title`, a blank line and `> one sentence`, nothing else'
    if module and source(second).strip() != f'#| default_exp {module}':
        yield 'the second cell is `#| default_exp`, alone'
    if export and not module: yield 'exported cells, but no default_exp'
    if export > 200: yield f'{export} exported lines (at most 200 a page)'
    if lines > 10 and words < lines: yield f'{words} words of prose for {lines} lines of code (one a line)'
    for text in code: yield from cell_faults(text)
    odd = {c for cell in cells(nb) for c in source(cell) if c < ' ' and c != '\n'}
    if odd: yield f'control characters, as from an unescaped backslash: {odd}'

@pytest.mark.parametrize('nb', NOTEBOOKS)
def test_page_keeps_the_house_style(nb):
    faults = list(page_faults(nb))
    assert not faults, '\n'.join(faults)

def test_style_check_sees_faults():
    assert all(map(mixed, ['import os\nx = 1', 'def f():\n    import os', '#| export\nimport os\nx = 1']))
    assert not any(map(mixed, ['import os\nfrom re import sub', '#| export\ndef f():\n    import os']))
    assert len(list(cell_faults('#| export\ndef f():\n' + '    x = 1\n' * 40))) == 2
    assert len(list(cell_faults('x' * 111))) == 1

def test_notebooks_are_clean():
    "As nbdev_clean leaves them: no counters, no stray metadata"
    dirty = []
    for nb in NOTEBOOKS:
        text = (NBS/nb).read_text(encoding='utf-8')
        clean = json.loads(text)
        clean_nb(clean, False, [], CFG['allowed_cell_metadata_keys'].split(), True)
        if nb2str(clean) != text: dirty.append(nb)
    assert not dirty, f'{dirty}: run nbdev_clean'

# ---- layers and package ----

def number(nb):
    "12b_data.splits -> (12, 'b')"
    found = re.match(r'(\d+)([a-z]*)_', Path(nb).name)
    return int(found[1]), found[2]

def imported_modules(text, names):
    "The modules of this library that a piece of code imports; `names` are those that exist"
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Import): found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f'{node.module}.{a.name}' for a in node.names]
            found = [m if m.removeprefix(LIB + '.') in names else node.module for m in inner]
        else: continue
        yield from (m.removeprefix(LIB + '.') for m in found if m and m.startswith(LIB + '.'))

def test_layers_point_down():
    "An exported cell imports only from notebooks of lower numbers"
    layer = {module_of(nb).removesuffix('.__init__'): number(nb) for nb in NOTEBOOKS if module_of(nb)}
    wrong = []
    for nb in NOTEBOOKS:
        for module in (m for text in code_cells(nb) if exported(text) for m in imported_modules(text, layer)):
            if module not in layer: wrong.append(f'{nb} imports {module}, which no notebook exports')
            elif layer[module] >= number(nb): wrong.append(f'{nb} imports {module} of layer {layer[module]}')
    assert not wrong, '\n'.join(wrong)

def test_imports_are_found():
    code = 'import LIB.a.b\nfrom LIB import c, __version__\nfrom LIB.d import e\ndef f():\n    import LIB.g'
    found = imported_modules(code.replace('LIB', LIB), {'a.b', 'c', 'd', 'd.e', 'g'})
    assert sorted(found) == ['a.b', 'c', 'd.e', 'g']

def test_names_of_modules_pages_and_anchors_are_unique():
    modules = [module_of(nb) for nb in NOTEBOOKS if module_of(nb)]
    assert len(set(modules)) == len(modules)
    assert len({page_address(nb, CFG) for nb in NOTEBOOKS}) == len(NOTEBOOKS)
    for module, names in runpy.run_path(ROOT/LIB/'_modidx.py')['d']['syms'].items():
        anchors = [page.partition('#')[2] for page, _ in names.values()]
        assert len(set(anchors)) == len(anchors), f'{module}: two names differ only in case'

def test_package_is_what_the_notebooks_export(tmp_path):
    project_copy(tmp_path, 'settings.ini', 'nbs')
    execute(sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=tmp_path)
    made, there = ({p.relative_to(root).as_posix(): p.read_bytes() for p in (root/LIB).rglob('*.py')}
                   for root in (tmp_path, ROOT))
    wrong = sorted(k for k in made.keys() | there.keys() if made.get(k) != there.get(k))
    assert not wrong, f'{wrong}: edit the notebook, run nbdev_export; delete modules whose notebook is gone'

WANTED = {'data': {'Interactions', 'load', 'synthetic', 'leave_one_out'},
          'models': {'SASRec', 'create', 'MODELS', 'check_model'}}
WANTED['all'] = WANTED['data'] | WANTED['models'] | {'Batch', 'Trainer', 'ranks', 'Experiment', 'run'}

@pytest.mark.parametrize('module', WANTED)
def test_star_import_brings_the_names(module):
    "nbdev writes an empty `__all__` for a page that only re-exports, unless the page says otherwise"
    names = execute(sys.executable, '-c', f'from {LIB}.{module} import *; print(*dir())', cwd=ROOT).split()
    assert WANTED[module] <= set(names)

# ---- docs ----

def sidebar_pages(entry):
    "Every notebook that a part of the sidebar names"
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [page for e in entry for page in sidebar_pages(e)]
    return sidebar_pages(entry.get('href', [])) + sidebar_pages(entry.get('contents', []))

def test_sidebar_and_notebooks_agree():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    pages = sidebar_pages(config['website']['sidebar']['contents'])
    assert len(set(pages)) == len(pages)
    assert set(pages) == set(NOTEBOOKS)

def links(markdown):
    "Targets of links and pictures, outside code"
    text = re.sub(r'^```.*?^```|`[^`\n]*`', 'code', markdown, flags=re.M | re.S)
    return re.findall(r'\]\(\s*<?([^)\s>]+)', text) + re.findall(r'(?:href|src)="([^"]+)"', text)

def headings(nb):
    "The anchors that Quarto gives to a page's headings"
    text = re.sub(r'^```.*?^```', '', prose(nb), flags=re.M | re.S)
    for heading in re.findall(r'^#+\s+(.+?)\s*$', text, flags=re.M):
        yield re.sub(r'\s+', '-', re.sub(r'^[^a-z]+', '', re.sub(r'[^\w\s.-]', '', heading.lower())))

def broken(link, folder):
    "Does a link in a file of `folder` lead nowhere? (Addresses of others are not tried.)"
    target, _, anchor = link.partition('#')
    in_repository = re.search(rf"/{CFG['repo']}/blob/{CFG['branch']}/(.+)", target)
    if target.startswith(CFG['doc_host']): return target not in {page_address(nb, CFG) for nb in NOTEBOOKS}
    if in_repository: return not (ROOT/in_repository[1]).exists()
    if re.match(r'https?:|mailto:', target) or not target: return False
    path = (folder/target).resolve()
    if not path.exists(): return True
    return path.suffix == '.ipynb' and anchor not in ('', *headings(path.relative_to(NBS).as_posix()))

def test_docs_are_made_and_links_resolve(tmp_path):
    "nbdev's processing of every page, which is all that comes before Quarto; then every link in what it made"
    project_copy(tmp_path, 'settings.ini', 'nbs', LIB)
    execute(sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)',
            cwd=tmp_path, PYTHONPATH=str(tmp_path))
    wrong = []
    for nb in NOTEBOOKS:
        made = json.loads((tmp_path/'_proc'/nb).read_text(encoding='utf-8'))['cells']
        text = '\n\n'.join(source(c) for c in made if c['cell_type'] == 'markdown')
        if f"{CFG['git_url']}/blob/{CFG['branch']}/nbs/{nb}" not in text: wrong.append(f'{nb} has no buttons')
        wrong += [f'{nb}: {link}' for link in links(text) if broken(link, (NBS/nb).parent)]
    for path in [*ROOT.glob('*.md'), *ROOT.glob('kaggle/*.md')]:
        found = links(path.read_text(encoding='utf-8'))
        wrong += [f'{path.name}: {link}' for link in found if broken(link, path.parent)]
    assert not wrong, '\n'.join(wrong)

def test_link_check_sees_broken_links():
    text = '[page](00_core.ipynb#one-batch), [`x`](x.ipynb), ![p](y.png), `[code](z)`, <a href="#top">top</a>'
    assert links(text) == ['00_core.ipynb#one-batch', 'x.ipynb', 'y.png', '#top']
    assert [link for link in links(text) if broken(link, NBS)] == ['x.ipynb', 'y.png']
    assert broken('00_core.ipynb#of-no-such-name', NBS) and broken(CFG['doc_host'] + '/nowhere.html', NBS)

def test_readme_is_its_notebook():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme(ROOT), f'run python -m {LIB}.project'

def test_addresses_come_from_settings(tmp_path):
    "What Quarto reads follows settings.ini, and nobody types an address anywhere else"
    project_copy(tmp_path, 'settings.ini', 'nbs')
    code = 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()'
    execute(sys.executable, '-c', code, cwd=tmp_path)
    made = (tmp_path/'nbs/nbdev.yml').read_text(encoding='utf-8')
    assert made == (NBS/'nbdev.yml').read_text(encoding='utf-8'), f'run python -m {LIB}.project'
    pointer = yaml.safe_load((NBS/'_quarto.yml').read_text(encoding='utf-8'))
    assert pointer == {'metadata-files': ['../_quarto.yml', 'nbdev.yml']}
    allowed = {'settings.ini', 'README.md', 'nbs/nbdev.yml', f'{LIB}/_modidx.py'}
    hosts = [CFG[key].partition('://')[2] for key in ('git_url', 'doc_host')]
    assert [p for p, text in repository_texts() if p not in allowed and any(h in text for h in hosts)] == []

# ---- wheel ----

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, made as a user makes it for Kaggle"
    files = 'settings.ini', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', LIB, 'kaggle'
    project = project_copy(tmp_path_factory.mktemp('wheel')/'project', *files)
    execute(sys.executable, 'kaggle/prepare.py', 'somebody', cwd=project)
    found, = project.glob('kaggle/build/wheel/*.whl')
    return found

IMPORT_ALL = f'''
import importlib, pkgutil, sys
from importlib.metadata import distribution
target, blocked = sys.argv[1], sys.argv[2:]
class NotDeclared:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in blocked: raise ModuleNotFoundError(f'{{name}}: not required', name=name)
sys.meta_path.insert(0, NotDeclared())
import {LIB}
modules = [importlib.import_module(info.name) for info in pkgutil.walk_packages({LIB}.__path__, '{LIB}.')]
assert modules and all(m.__file__.startswith(target) for m in modules), [m.__file__ for m in modules]
for point in distribution('{LIB}').entry_points: print(point.group, point.load())
'''

def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
    "A bare venv that sees the installed wheel and its requirements, not the checkout, imports every module"
    pip = sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index'
    execute(*pip, '--target', tmp_path/'target', wheel, cwd=tmp_path)
    execute(sys.executable, '-m', 'venv', '--without-pip', tmp_path/'bare', cwd=tmp_path)
    site, = (tmp_path/'bare').glob('lib/*/site-packages')
    # a folder named in a .pth file is searched, but the .pth files in it (an editable install) are not read
    (site/'seen.pth').write_text(f"{tmp_path/'target'}\n{sysconfig.get_paths()['purelib']}\n")
    (tmp_path/'all.py').write_text(IMPORT_ALL)
    others = 'nbdev', 'execnb', 'IPython', 'ipywidgets', 'papermill', 'pytest', 'kaggle', 'mamba_ssm'
    printed = execute(tmp_path/'bare/bin/python', '-I', 'all.py', tmp_path/'target', *others, cwd=tmp_path)
    assert 'console_scripts' in printed and 'nbdev' in printed

def test_kaggle_kernel_installs_the_wheel_and_starts(wheel, tmp_path):
    "In a folder that looks like Kaggle's: the wheel lies in a dataset, the working folder is empty"
    kernel = wheel.parents[1]/'kernel'
    metadata = json.loads((kernel/'kernel-metadata.json').read_text())
    dataset = json.loads((wheel.parent/'dataset-metadata.json').read_text())
    assert metadata['id'] == 'somebody/' + metadata['title'] and (kernel/metadata['code_file']).exists()
    assert metadata['dataset_sources'] == [dataset['id']] == ['somebody/' + dataset['title']]
    mount = tmp_path/'input/datasets/somebody/seqrec-nb-wheel'
    for folder in (mount, tmp_path/'working'): folder.mkdir(parents=True)
    shutil.copy2(wheel, mount)
    printed = execute(sys.executable, kernel/'train.py', '--help', cwd=tmp_path, KAGGLE_ROOT=str(tmp_path))
    assert '--preset' in printed

# ---- unsafe loading, secrets, other people's data ----

def repository_files():
    "Every file that is committed, or would be"
    command = 'git', 'ls-files', '-co', '--exclude-standard', '-z'
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    return [ROOT/name for name in listed.stdout.split('\0') if name and (ROOT/name).is_file()]

def repository_texts():
    "Path and text of every such file that is text"
    for path in repository_files():
        try: yield path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue

def strings(x):
    "Every text in a JSON value; a list of texts is the lines of one"
    if isinstance(x, str): yield x
    elif isinstance(x, dict): yield from (s for part in (*x, *x.values()) for s in strings(part))
    elif isinstance(x, list) and all(isinstance(part, str) for part in x): yield ''.join(x)
    elif isinstance(x, list): yield from (s for part in x for s in strings(part))

def notebook_texts(nb):
    "Sources and printed outputs; pictures are random letters and left out"
    for cell in cells(nb):
        yield source(cell)
        yield from strings(cell.get('metadata', {}))
        for output in cell.get('outputs', []):
            data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/')}
            yield from strings({**output, 'data': data})

UNSAFE = re.compile(r'''(?:import|from)\s+(?:c?pickle|dill|joblib|shelve|marshal)\b|read_pickle|to_pickle
    |torch\.(?:load|save)\( |yaml\.(?:unsafe_|full_)?load\( |allow_pickle\s*=\s*True |extractall\(
    |(?<![\w.])(?:eval|exec)\( |os\.system\( |shell\s*=\s*True''', re.X)

def test_no_unsafe_loading():
    "No pickle, no eval, no blind unpacking in the package, the notebooks or the scripts"
    scripts = [p for folder in (LIB, 'kaggle', 'benchmarks') for p in (ROOT/folder).rglob('*.py')]
    texts = [(str(p.relative_to(ROOT)), p.read_text(encoding='utf-8')) for p in scripts]
    texts += [(nb, text) for nb in NOTEBOOKS for text in code_cells(nb)]
    assert [f'{where}: {m[0]}' for where, text in texts for m in UNSAFE.finditer(text)] == []

def test_unsafe_loading_is_seen():
    unsafe = 'import pickle', 'torch.load(p)', 'yaml.load(f)', 'eval(x)', 'z.extractall(d)', \
             'load(p, allow_pickle=True)'
    assert all(map(UNSAFE.search, unsafe))
    assert not UNSAFE.search('model.eval(); literal_eval(x); yaml.safe_load(f); load(p, allow_pickle=False)')

SECRET = re.compile(r'''gh[pousr]_[A-Za-z0-9]{36} |github_pat_\w{22,} |hf_[A-Za-z0-9]{30,}
    |(?:AKIA|ASIA)[0-9A-Z]{16} |\bsk-[A-Za-z0-9_-]{24,} |xox[abprs]-[\w-]{10,} |AIza[\w-]{35}
    |pypi-[\w-]{40,} |KGAT_\w{20,} |eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}
    |-----BEGIN\ [A-Z\ ]*PRIVATE\ KEY |["']key["']\s*:\s*["'][0-9a-f]{32}["'] |(?i:\w+_(?:key|token|secret|password))=["']?(?:[0-9a-f]{32,}|[A-Za-z0-9+/_-]{36,})
    |(?i:wandb[^\n]{0,40}?)(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f]) |(?i:aws_secret_access_key)\W{1,5}[A-Za-z0-9/+]{40}
    |\w+://[^\s/:@'"{}<>]+:[^\s/:@'"{}<>]+@\w
    |(?i:token|secret|password|api_key)\s*=\s*['"][A-Za-z0-9+/_-]{20,}['"]''', re.X)

def test_no_secrets():
    "Nothing shaped like a token, in files or in what a notebook printed"
    texts = [(nb, text) for nb in NOTEBOOKS for text in notebook_texts(nb)]
    texts += [(path, text) for path, text in repository_texts() if not path.endswith('.ipynb')]
    assert [f'{where}: {m[0][:8]}…' for where, text in texts for m in SECRET.finditer(text)] == []

def test_secrets_are_seen():
    "The examples are put together here, so that this file does not look like a leak itself"
    made = ('ghp_' + 'a1' * 18, 'hf_' + 'Ab' * 17, 'AKIA' + 'Z7' * 8,
            '"key":"' + '0f' * 16 + '"', 'token = "' + 'x9' * 12 + '"')
    assert all(SECRET.search(f'print({secret})') for secret in made)

def test_notebooks_show_no_local_paths():
    local = re.compile(r'/(?:home|root|Users|work)/\w[^\s"\']*')
    texts = [(nb, text) for nb in NOTEBOOKS for text in notebook_texts(nb)]
    assert [f'{nb}: {m[0]}' for nb, text in texts for m in local.finditer(text)] == []

def test_repository_holds_no_large_or_binary_data():
    data = {'.zip', '.gz', '.tar', '.npz', '.npy', '.parquet', '.safetensors', '.pt', '.pth', '.ckpt', '.pkl',
            '.dat', '.inter', '.whl'}
    def limit(path): return 400_000 if path.suffix == '.ipynb' else 300_000
    def made_here(path): return 'tests/assets' in path.as_posix() and path.stat().st_size < 20_000    # a frozen checkpoint of a toy
    wrong = [p for p in repository_files() if p.suffix in data and not made_here(p) or p.stat().st_size > limit(p)]
    assert wrong == []

@needs_data
def test_repository_holds_no_rows_of_licensed_sets(data_dir):
    "A line or two may show a format; a table of somebody's ratings may not be here"
    files = 'ml-100k/u.data', 'ml-1m/ratings.dat'
    rows = {line for name in files for line in (data_dir/name).read_text(encoding='utf-8').splitlines()}
    held = {}
    for path, text in repository_texts():
        texts = notebook_texts(path.removeprefix('nbs/')) if path.endswith('.ipynb') else [text]
        held[path] = sum(line.strip('\'", ') in rows for text in texts for line in text.splitlines())
    assert {path: n for path, n in held.items() if n > 2} == {}
