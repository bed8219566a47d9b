"""The method: on-policy preference optimisation, readable without Ray, vLLM or Slurm."""
