"""Pictures of runs: curves of losses, sheets of what a model makes of its inputs."""
