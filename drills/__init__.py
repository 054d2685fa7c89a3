"""The pipeline broken on purpose, with real tools and real signals, full disks and dead servers; see __main__."""
