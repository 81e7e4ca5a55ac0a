import sys; sys.path.insert(0,'/tmp/wt/coopt/tests/distributed'); sys.path.insert(0,'/tmp/wt/coopt/tests')
import test_losses
for k in [k for k in test_losses.CASES if not k.startswith(('co_','co-'))]: del test_losses.CASES[k]
from test_losses import *
