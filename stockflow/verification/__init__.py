"""A published output held against its manifest and its inputs."""
