"""Every failure that a user can meet, each a short letter: what happened, why, what to type next.

The docstring of a class is the template of its letter; the constructor fills it in. `cli.py` prints
letters at the one outermost door, so nothing else in the program prints an error.
"""

from p2pllm.errors.config import *
from p2pllm.errors.data import *
from p2pllm.errors.demo import *
from p2pllm.errors.letter import P2PLLMError as P2PLLMError
from p2pllm.errors.model import *
from p2pllm.errors.network import *
from p2pllm.errors.run import *
from p2pllm.errors.training import *
