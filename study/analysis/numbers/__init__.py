"""Result files, statistics, verdicts and tables: numbers alone, no figures."""
