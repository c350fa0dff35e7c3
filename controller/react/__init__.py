"""Running a command or calling a webhook for each event: retries, signatures, dead letters."""
