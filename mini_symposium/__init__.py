"""MiniSymposium: fine-tune a language model on a dozen handwritten examples, and know what happened.

Importing the package costs nothing: each module loads what it needs, and only the modules that touch weights load
torch.
"""

import logging

# On a CPU bitsandbytes advises at import to install optional kernels; it works without them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
