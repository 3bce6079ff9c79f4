"""
    Continue()

The survivors keep their trained values and are trained on (Han et al. 2015, arXiv:1506.02626), at the learning rate of
the last epoch of the first training.
"""
struct Continue end

"""
    LearningRateRewind()

The survivors keep their trained values, and the learning rate starts again as in the first training (Renda, Frankle &
Carbin 2020, arXiv:2003.02389). The same as [`Continue`](@ref) where [`Training`](@ref) has no `decay`.
"""
struct LearningRateRewind end

"""
    Rewind(; to = 0)

The survivors, and all other parameters, go back to their values after `to` steps of the first training; 0 is
the initialisation (Frankle & Carbin 2019, arXiv:1803.03635; `to > 0`: late rewinding, Frankle et al. 2020,
arXiv:1912.05671).
"""
Base.@kwdef struct Rewind
    to::Int = 0
end

"""
    Reinitialize(; init = glorot_uniform)

The survivors start from new random values, `init(rng, size...)`; all other parameters from their initial ones.
"""
Base.@kwdef struct Reinitialize{F}
    init::F = glorot_uniform
end

"""
    restart!(finetune, model, origin, rng)

Set `model` to where its survivors restart from, masks untouched. `origin` is a copy of the model as it was
after [`origin_step`](@ref)`(finetune)` steps.
"""
restart!(::Union{Continue,LearningRateRewind,Nothing}, model, origin, rng) = model
restart!(::Rewind, model, origin, rng) = restore!(model, origin)
function restart!(finetune::Reinitialize, model, origin, rng)
    restore!(model, origin)
    for layer in prunables(model)
        copyto!(weight(layer), finetune.init(rng, size(layer.mask)...))
    end
    return mask!(model)
end

"The epoch whose learning rate holds in each epoch after a restart."
rate_epoch(finetune, training, epoch) = epoch
rate_epoch(::Continue, training, epoch) = training.epochs

"The number of steps of the first training after which a copy of the model is kept."
origin_step(finetune::Rewind) = finetune.to
origin_step(finetune) = 0

function check_restart(finetune, steps)
    finetune isa Union{Continue,LearningRateRewind,Rewind,Reinitialize,Nothing} || throw(ArgumentError(
        "finetune must be Continue(), LearningRateRewind(), Rewind(), Reinitialize() or nothing, not $finetune"))
    0 <= origin_step(finetune) <= steps || throw(ArgumentError(
        "finetune must rewind to one of the $steps training steps, not $(origin_step(finetune))"))
end

function restore!(model, origin)
    foreach((now, then) -> copyto!(then.mask, now.mask), prunables(model), prunables(origin))
    Flux.loadmodel!(model, origin)
    return mask!(model)
end
