-- Warm sandboxes: role is 'warm' until one is claimed; 'boot' is the hash of what it was made with.
ALTER TABLE sandboxes ADD COLUMN agent TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN boot TEXT NOT NULL DEFAULT '';
