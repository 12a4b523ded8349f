"""A PEFT adapter directory to ``AdapterWeights``: applied in full, or refused with every reason in one message.

What is served is plain LoRA on the projections of ``kernels.sites`` (docs: adapters.md). The tensors of the file are
the truth about which modules carry a delta, and the config must agree with them in both directions: a module that only
one of the two knows is how wrong weights are served without anyone noticing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from manylora.adapters.chat_template import read_chat_template
from manylora.adapters.errors import AdapterRefused, AdapterSourceNotFound
from manylora.adapters.peft_config import ParsedConfig, PeftLoraConfig, parse_config
from manylora.adapters.peft_tensors import Found, read_tensors
from manylora.adapters.weights import AdapterWeights, LoadReport
from manylora.kernels.lora_pool import LoraPair
from manylora.kernels.sites import GLOBAL_PROJECTIONS, PROJECTIONS, LoraShapes
