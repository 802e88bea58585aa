"""half.py PART OUT.csv SETTINGS [COUNT] [knob words for TINY_MOTION...]: every second of COUNT held-out clips."""
import sys; sys.path.insert(0,'/work/main')
from wan_mini.tiny import evaluate
part,out,settings=int(sys.argv[1]),sys.argv[2],sys.argv[3]; count=sys.argv[4] if len(sys.argv)>4 else '50'
old=evaluate.clip_seeds
evaluate.clip_seeds=lambda seed,n: old(seed,n)[part::2]
evaluate.program(['--clips',count,'--settings',settings,'--csv',out,'--oracle-clips','2','--device','cpu'])
