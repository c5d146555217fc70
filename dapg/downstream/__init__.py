"""Fine-tuning with AGW and CIL, and the protocols of SYSU-MM01 and RegDB, clean and corrupted (sec. III)."""
