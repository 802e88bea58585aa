"""edit(nb, cell, old, new): replace text in one cell, exactly once."""
import json
from pathlib import Path
ROOT=Path('/work/main/notebooks')
def edit(name, cell, *pairs):
    path=next(ROOT.glob(f'{name}*.ipynb')) if '/' not in name else next(ROOT.glob(f'{name}*.ipynb'))
    nb=json.loads(path.read_text('utf-8')); c=nb['cells'][cell]; s=''.join(c['source'])
    for old,new in pairs:
        assert s.count(old)==1,(name,cell,s.count(old),old)
        s=s.replace(old,new)
    c['source']=s.splitlines(keepends=True)
    path.write_text(json.dumps(nb,indent=1,ensure_ascii=False)+'\n','utf-8')
