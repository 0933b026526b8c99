"""What `speculate` proposes with: one drafter a file."""
