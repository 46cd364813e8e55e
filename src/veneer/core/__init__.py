"""Live adapters on a live model. Needs torch and safetensors, nothing else."""
