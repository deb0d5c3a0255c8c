"""What a process that ``multiprocessing`` starts anew has for ``__main__`` when ``python -m fbn_plugin`` runs a script:
that script's names, after the norms are registered."""

if __name__ == "__mp_main__":
    from fbn_plugin.engine.run.script import main_of_new_process

    globals().update(main_of_new_process())
