-- Beside POSTGRES_DB, which is MLflow's: the key store.
CREATE DATABASE hokusai;
