"""A Kaggle kernel: install seqrec_nb from the attached dataset, say what the machine can do, train.

Arguments are those of `seqrec train`; Kaggle gives none, so change ARGUMENTS. KAGGLE_ROOT lets a test play Kaggle.
"""
from pathlib import Path
import os, subprocess, sys, tempfile

ARGUMENTS = ['sasrec', 'ml-100k', '--preset', 'quick']

root = Path(os.environ.get('KAGGLE_ROOT', '/kaggle'))
wheels = sorted(root.joinpath('input').rglob('seqrec_nb-*.whl'))   # the folder's depth differs between images
if not wheels: sys.exit(f'no seqrec_nb wheel under {root}/input: attach the dataset that kaggle/prepare.py makes')
site = tempfile.mkdtemp()
# --no-deps: the image's torch fits its driver and must stay
subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', site, wheels[-1]], check=True)

def seqrec(*arguments) -> int:
    code = 'import sys; from seqrec_nb.cli import main; sys.exit(main())'
    env = os.environ | {'PYTHONPATH': site}
    return subprocess.run([sys.executable, '-c', code, *arguments], cwd=root/'working', env=env).returncode

seqrec('doctor')
sys.exit(seqrec('train', *(sys.argv[1:] or ARGUMENTS), '--out', str(root/'working/run')))
