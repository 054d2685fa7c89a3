"""What MLflow runs to open a version, for example `mlflow.pyfunc.load_model("models:/llm-from-scratch-sft@champion")`.

MLflow keeps a copy of this file beside each version (its "models from code"), so it says no more than where the work is done.
"""

from llm_from_scratch import tracking
from llm_from_scratch.registry.opening import open_version

tracking.be_pyfunc(open_version)
