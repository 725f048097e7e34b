import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest_models import SPEC, TRAIN, files_of, make_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechhier.models.run import Run, RunError
from mechhier.models.spec import ModelSpec, TrainSpec
from mechhier.models.training import TrainingError, train
