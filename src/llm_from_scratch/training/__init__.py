"""One loop that trains every neural rung and every fine-tuning method: a batch, a loss, a plan."""
