"""What command lines are made of: flags, prompt files, printers, the chat. No other package imports from here."""
