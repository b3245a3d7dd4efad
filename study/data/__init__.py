"""Sources, tasks and corpus: text and labels; nothing here knows about models."""
