"""The parts of command lines: flags, prompt files, printers, the chat. Nothing below the command lines imports them."""
