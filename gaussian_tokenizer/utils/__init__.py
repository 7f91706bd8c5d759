"""Files, processes and versions: what every room above stands on. Imports nothing of ours."""
